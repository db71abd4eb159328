// Shows the text results of our nodes on the nodes themselves, tables as tables. ComfyUI's own progress text is for
// the time of a run: newer interfaces take it away when the run has ended. This stays, and is saved with the graph.

import { app } from "../../scripts/app.js"

const PREFIX = "NGRPO_"
const NAME = "result"
const KEPT = "ngrpo_result" // property of a node
const PROGRESS = "$$node-text-preview" // ComfyUI's widget for progress text, which older interfaces leave behind
const LINE_PX = 17
const MOST_PX = 180
const MARGINS_PX = 20 // which ComfyUI takes from the height of a widget

function cellsOf(line) {
  return line.slice(1, line.lastIndexOf("|")).split(/(?<!\\)\|/).map((cell) => cell.trim().replaceAll("\\|", "|"))
}

function isRule(line) {
  return /^\|[\s:|-]+\|$/.test(line)
}

// Texts may be a stranger's: they become text, never HTML.
function tableOf(lines) {
  const table = document.createElement("table")
  table.style.cssText = "border-collapse: collapse; width: 100%;"
  lines.forEach((line, number) => {
    if (isRule(line)) return
    const row = table.insertRow()
    for (const cell of cellsOf(line)) {
      const made = row.appendChild(document.createElement(number ? "td" : "th"))
      made.textContent = cell
      made.style.cssText = "text-align: left; padding: 0 8px 0 0; border-bottom: 1px solid #8884;"
    }
  })
  return table
}

function partsOf(text) {
  const parts = []
  for (const line of text.split("\n")) {
    const inTable = line.startsWith("|")
    if (parts.at(-1)?.inTable !== inTable) parts.push({ inTable, lines: [] })
    parts.at(-1).lines.push(line)
  }
  return parts
}

function fill(element, text) {
  element.replaceChildren(
    ...partsOf(text).map(({ inTable, lines }) => {
      if (inTable) return tableOf(lines)
      const made = document.createElement("div")
      made.textContent = lines.join("\n").trim()
      made.style.cssText = "white-space: pre-wrap; overflow-wrap: anywhere; padding: 3px 0;"
      return made
    })
  )
  element.style.minHeight = `${heightOf(text)}px`
}

function heightOf(text) {
  return Math.min(LINE_PX * text.split("\n").filter((line) => !isRule(line)).length + 12, MOST_PX)
}

function addTo(node) {
  const element = document.createElement("div")
  element.className = "ngrpo-result"
  element.style.cssText =
    "contain: size; height: 100%; overflow: auto; box-sizing: border-box; padding: 2px 6px; font-size: 11px; " +
    "line-height: 16px; user-select: text; border-radius: 4px; color: var(--input-text); background: var(--comfy-input-bg);"
  element.addEventListener("wheel", (event) => {
    if (element.scrollHeight > element.clientHeight) event.stopPropagation() // else the graph zooms
  })
  const text = () => node.properties[KEPT] ?? ""
  const widget = node.addDOMWidget(NAME, "ngrpo_result", element, {
    serialize: false,
    hideOnZoom: false,
    getValue: text,
    setValue: () => {},
    getMinHeight: () => heightOf(text()) + MARGINS_PX,
    getMaxHeight: () => 2 * MOST_PX,
  })
  widget.serialize = false
  setTimeout(() => drawAnew(node, widget), 500)
  return widget
}

// Vue's first version (interface 1.32) draws the widgets that a node had at first, until it is told of the node again.
export function drawAnew(node, widget) {
  const drawn = document.querySelector(`[data-node-id="${node.id}"]`)
  if (drawn && widget.element.isConnected !== node.widgets.includes(widget)) node.graph?.onNodeAdded?.(node)
}

function show(node, text) {
  node.properties[KEPT] = text
  const progress = node.widgets?.find((widget) => widget.name === PROGRESS)
  if (progress) node.removeWidget?.(progress)
  const widget = node.widgets?.find((widget) => widget.name === NAME) ?? addTo(node)
  fill(widget.element, text)
  const [width, height] = node.computeSize()
  node.setSize([Math.max(node.size[0], width), Math.max(node.size[1], height)])
  node.setDirtyCanvas(true, true)
}

app.registerExtension({
  name: "ngrpo-lora.results",
  beforeRegisterNodeDef(nodeType, definition) {
    if (!definition.name.startsWith(PREFIX)) return
    const { onExecuted, onConfigure } = nodeType.prototype
    nodeType.prototype.onExecuted = function (output) {
      onExecuted?.apply(this, arguments)
      if (output?.text?.length) show(this, output.text.join("\n"))
    }
    nodeType.prototype.onConfigure = function () {
      onConfigure?.apply(this, arguments)
      if (this.properties[KEPT]) show(this, this.properties[KEPT])
    }
  },
})

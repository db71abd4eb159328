// Shows the voting page of a run in a frame at its node, below a link to it, for as long as the page is open.

import { api } from "../../scripts/api.js"
import { app } from "../../scripts/app.js"
import { drawAnew } from "./results.js"

const KIND = "NGRPO_Train"
const EVENT = "ngrpo.vote" // {node, path, others}, sent once a second; path is null when the page is closed
const NAME = "vote"
const SIZE = "ngrpo_size" // property of a node: how large it was without the page, also where the graph is saved with it
const LEAST_PX = { width: 520, height: 640 } // six pictures, to be told apart
const TOUCHABLE = "pointer-events: auto;" // from afar too, where Vue's first version (1.32) leaves widgets untouched

// Of a node within subgraphs the number is that of each of them: "4:7".
function nodeOf(id) {
  const root = app.rootGraph ?? app.graph
  const node = String(id)
    .split(":")
    .reduce((inside, number) => (inside?.subgraph ?? inside)?.getNodeById?.(Number(number)), root)
  return node?.type === KIND ? node : null // another graph may be open
}

function linkTo(address) {
  const link = document.createElement("a")
  link.href = link.textContent = address
  link.target = "_blank"
  link.rel = "noreferrer"
  link.style.cssText = `color: inherit; overflow-wrap: anywhere; display: block; ${TOUCHABLE}`
  return link
}

function addTo(node) {
  const element = document.createElement("div")
  element.className = "ngrpo-vote"
  element.style.cssText =
    "contain: size; height: 100%; box-sizing: border-box; display: flex; flex-direction: column; gap: 4px; " +
    `min-height: ${LEAST_PX.height}px; font-size: 11px; user-select: text; color: var(--input-text);`
  element.append(document.createElement("div"), document.createElement("iframe"))
  element.lastChild.style.cssText = `flex: 1; width: 100%; border: 0; border-radius: 4px; ${TOUCHABLE}`
  const widget = node.addDOMWidget(NAME, "ngrpo_vote", element, {
    serialize: false,
    hideOnZoom: false,
    getValue: () => "",
    setValue: () => {},
    getMinHeight: () => LEAST_PX.height,
  })
  widget.serialize = false
  node.properties[SIZE] = [...node.size]
  const [width, height] = node.computeSize()
  node.setSize([Math.max(node.size[0], width, LEAST_PX.width), Math.max(node.size[1], height)])
  setTimeout(() => drawAnew(node, widget), 500)
  return widget
}

function show(node, addresses) {
  const widget = node.widgets?.find((widget) => widget.name === NAME) ?? addTo(node)
  const [links, frame] = widget.element.children
  if (frame.src === addresses[0]) return
  frame.src = addresses[0]
  links.replaceChildren(...addresses.map(linkTo))
  node.setDirtyCanvas(true, true)
}

function remove(node) {
  const widget = node.widgets?.find((widget) => widget.name === NAME)
  if (!widget) return
  node.removeWidget(widget)
  setTimeout(() => drawAnew(node, widget), 500)
  shrink(node)
}

function shrink(node) {
  node.setSize(node.properties[SIZE])
  delete node.properties[SIZE]
  node.setDirtyCanvas(true, true)
}

// The end of a run that nobody told this page of, as ComfyUI was gone or this machine asleep.
async function removeIfGone(node) {
  const frame = node.widgets?.find((widget) => widget.name === NAME)?.element.lastChild
  const answer = frame && (await fetch(`${frame.src}state`).catch(() => null))
  if (answer?.status === 404) remove(node)
}

function nodesIn(graph) {
  return graph._nodes.flatMap((node) => [node, ...(node.subgraph ? nodesIn(node.subgraph) : [])])
}

app.registerExtension({
  name: "ngrpo-lora.vote",
  beforeRegisterNodeDef(nodeType, definition) {
    if (definition.name !== KIND) return
    const { onConfigure } = nodeType.prototype
    nodeType.prototype.onConfigure = function () {
      onConfigure?.apply(this, arguments)
      if (this.properties[SIZE]) shrink(this) // until it is told where the page is
    }
  },
  setup() {
    api.addEventListener("reconnected", () => nodesIn(app.rootGraph ?? app.graph).forEach(removeIfGone))
    api.addEventListener(EVENT, ({ detail: { node: id, path, others } }) => {
      const node = nodeOf(id)
      if (node && path) show(node, [new URL(api.fileURL(path), location.href).href, ...others])
      else if (node) remove(node)
    })
  },
})

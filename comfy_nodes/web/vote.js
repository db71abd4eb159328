// Shows the voting page of a run in a frame at its node, below a link to it, for as long as the page is open.

import { api } from "../../scripts/api.js"
import { app } from "../../scripts/app.js"
import { drawAnew } from "./results.js"

const PREFIX = "NGRPO_"
const EVENT = "ngrpo.vote" // {node, path, others}, sent once a second; path is null when the page is closed
const NAME = "vote"
const LEAST_PX = { width: 520, height: 640 } // six pictures, to be told apart
const TOUCHABLE = "pointer-events: auto;" // from afar too, where Vue's first version (1.32) leaves widgets untouched

// Of a node within subgraphs the number is that of each of them: "4:7".
function nodeOf(id) {
  const root = app.rootGraph ?? app.graph
  const node = String(id)
    .split(":")
    .reduce((inside, number) => (inside?.subgraph ?? inside)?.getNodeById?.(Number(number)), root)
  return node?.type?.startsWith(PREFIX) ? node : null // another graph may be open
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
  widget.sizeBefore = [...node.size]
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
  node.setSize(widget.sizeBefore)
  node.setDirtyCanvas(true, true)
}

app.registerExtension({
  name: "ngrpo-lora.vote",
  setup() {
    api.addEventListener(EVENT, ({ detail: { node: id, path, others } }) => {
      const node = nodeOf(id)
      if (node && path) show(node, [new URL(api.fileURL(path), location.href).href, ...others])
      else if (node) remove(node)
    })
  },
})

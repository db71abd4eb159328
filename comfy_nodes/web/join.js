// Shows of the inputs of a node that joins, adapters_1, adapters_2, ..., those up to the last connected one and one more.

import { app } from "../../scripts/app.js"

const KINDS = ["NGRPO_JoinAdapters", "NGRPO_JoinRewards"]
const LEAST = 2

function fit(node) {
  const last = node.inputs.findLastIndex((input) => input.link != null)
  const wanted = Math.min(Math.max(last + 2, LEAST), node.growing.length)
  if (!node.graph || node.inputs.length === wanted) return
  while (node.inputs.length > wanted) node.removeInput(node.inputs.length - 1)
  for (const { name, type, ...shown } of node.growing.slice(node.inputs.length, wanted)) node.addInput(name, type, shown)
  resize(node)
  setTimeout(() => drawAnew(node), 500)
}

function resize(node) {
  node.setSize([node.size[0], node.computeSize()[1]])
  node.setDirtyCanvas(true, true)
}

// Vue's first version (interface 1.32) draws the inputs that a node had at first, until it is told of the node again.
function drawAnew(node) {
  const drawn = document.querySelector(`[data-node-id="${node.id}"]`)
  if (!drawn || drawn.querySelectorAll(".lg-slot--input").length === node.inputs.length) return
  node.graph?.onNodeAdded?.(node)
  resize(node)
}

// Later, as all inputs are needed while a graph is being read: an API format may leave some free in between.
function fitLater(node) {
  setTimeout(() => fit(node))
}

app.registerExtension({
  name: "ngrpo-lora.join",
  beforeRegisterNodeDef(nodeType, definition) {
    if (!KINDS.includes(definition.name)) return
    const { onNodeCreated, onConfigure, onConnectionsChange } = nodeType.prototype
    nodeType.prototype.onNodeCreated = function () {
      onNodeCreated?.apply(this, arguments)
      this.growing = this.inputs.map(({ name, type, localized_name, shape }) => ({ name, type, localized_name, shape }))
      fitLater(this)
    }
    nodeType.prototype.onConfigure = function () {
      onConfigure?.apply(this, arguments)
      fitLater(this)
    }
    nodeType.prototype.onConnectionsChange = function () {
      onConnectionsChange?.apply(this, arguments)
      fitLater(this)
    }
  },
})

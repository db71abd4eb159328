"use strict";

const Z = 1.959963984540054; // of a two-sided interval of 95%
const WORTH = { label: 1, tie: 0.5, reference: 0 };

/** The mean of wins, and Wilson's interval for it, as `statistics.share_interval` has it. */
function shareInterval(wins, groups) {
  const size = wins.length;
  const value = wins.reduce((sum, win) => sum + win, 0) / size;
  const alone = new Set(groups).size < 2; // of a single group every vote is a draw
  const sums = new Map();
  const sizes = new Map();
  wins.forEach((win, row) => {
    const group = alone ? row : groups[row];
    sums.set(group, (sums.get(group) ?? 0) + win - value);
    sizes.set(group, (sizes.get(group) ?? 0) + 1);
  });
  const total = (values, power) => [...values].reduce((sum, x) => sum + x ** power, 0);
  const squares = total(sizes.values(), 2) / size ** 2;
  const cubes = total(sizes.values(), 3) / size ** 3;
  const count = 1 / squares;
  const correction = squares / (squares - 2 * cubes + squares ** 2);
  const error2 = sums.size > 1 ? (correction * total(sums.values(), 2)) / size ** 2 : Infinity;
  const variance = value * (1 - value);
  const draws = error2 > 0 ? Math.min(Math.max(variance / error2, count), size) : variance > 0 ? size : count;
  const center = (value + Z ** 2 / (2 * draws)) / (1 + Z ** 2 / draws);
  const half = (Z / (1 + Z ** 2 / draws)) * Math.sqrt(variance / draws + Z ** 2 / (4 * draws ** 2));
  return { value, low: Math.max(0, center - half), high: Math.min(1, center + half) };
}

/** What is kept of a pair for which `side` (left, right or tie) was chosen. */
function voteOn(ballot, pair, side) {
  const choice = side === "tie" ? "tie" : side === pair.side ? "label" : "reference";
  return { label: ballot.label, reference: ballot.reference, prompt: pair.prompt, seed: pair.seed, side, choice };
}

/** Wins, ties and losses of a ballot's votes, and the share that its label wins. */
function tally(votes) {
  const count = (choice) => votes.filter((vote) => vote.choice === choice).length;
  const share = shareInterval(votes.map((vote) => WORTH[vote.choice]), votes.map((vote) => vote.prompt));
  return { wins: count("label"), ties: count("tie"), losses: count("reference"), share };
}

/** The file that `ngrpo compare --votes` reads. */
function votesFile(data, votes) {
  const { comparison, shuffle_seed } = data;
  return { format: "ngrpo-votes-1", comparison, shuffle_seed, votes: votes.flat() };
}

/** Which vote or command a key stands for. */
const KEYS = {
  ArrowLeft: "left", 1: "left", ArrowRight: "right", 2: "right", ArrowDown: "tie", 0: "tie", Backspace: "undo",
};

function start(data) {
  const $ = (id) => document.getElementById(id);
  const key = `ngrpo-votes-${data.comparison}`;
  let votes = data.ballots.map(() => []); // per ballot, in the order of its pairs
  let current = 0;
  try {
    votes = JSON.parse(localStorage.getItem(key)) ?? votes;
    $("kept").textContent = "votes are kept in this browser";
  } catch {
    $("kept").textContent = "this browser keeps nothing: save the votes before you close the page";
  }

  function keep() {
    try {
      localStorage.setItem(key, JSON.stringify(votes));
    } catch {} // said above
  }

  function act(side) {
    const { pairs } = data.ballots[current];
    const cast = votes[current];
    if (side === "undo") cast.pop();
    else if (cast.length < pairs.length) cast.push(voteOn(data.ballots[current], pairs[cast.length], side));
    keep();
    render();
  }

  function render() {
    const { label, reference, pairs } = data.ballots[current];
    const cast = votes[current];
    const done = cast.length === pairs.length;
    Object.assign($("progress"), { value: cast.length, max: pairs.length });
    $("count").textContent = `${cast.length} of ${pairs.length}`;
    $("vote").hidden = done;
    $("result").hidden = !done;
    $("undo").disabled = cast.length === 0;
    $("save").disabled = votes.flat().length === 0;
    if (done) return showResult(label, reference, tally(cast));
    const pair = pairs[cast.length];
    $("prompt").textContent = pair.prompt;
    $("source").hidden = pair.source === undefined;
    if (pair.source !== undefined) $("source").firstElementChild.src = data.images[pair.source];
    for (const side of ["left", "right"]) $(side).firstElementChild.src = data.images[pair[side]];
  }

  function showResult(label, reference, { wins, ties, losses, share }) {
    const percent = (value) => `${Math.round(100 * value)}%`;
    $("verdict").textContent = `${label} preferred to ${reference}: ${percent(share.value)}`;
    $("interval").textContent = `95% interval ${percent(share.low)} to ${percent(share.high)}; a tie is half a win`;
    $("tally").replaceChildren(...Object.entries({ [label]: wins, [reference]: losses, ties }).map(([name, count]) => {
      const row = document.createElement("tr");
      row.append(...[name, count].map((text) => Object.assign(document.createElement("td"), { textContent: text })));
      return row;
    }));
  }

  function save() {
    const text = JSON.stringify(votesFile(data, votes), null, 1);
    const url = URL.createObjectURL(new Blob([text], { type: "application/json" }));
    Object.assign(document.createElement("a"), { href: url, download: `votes-${data.comparison}.json` }).click();
    setTimeout(() => URL.revokeObjectURL(url), 1000);
  }

  $("ballot").append(...data.ballots.map((_, number) => new Option(`comparison ${number + 1}`, number)));
  $("ballot").hidden = data.ballots.length < 2;
  $("ballot").onchange = () => {
    current = Number($("ballot").value);
    $("ballot").blur(); // arrow keys are votes again
    render();
  };
  for (const button of document.querySelectorAll("#keys button")) button.onclick = () => act(button.dataset.side);
  for (const side of ["left", "right"]) {
    $(side).onclick = () => act(side);
    const image = $(side).firstElementChild;
    image.onload = () => image.classList.toggle("small", image.naturalWidth < 256);
  }
  $("undo").onclick = () => act("undo");
  $("save").onclick = save;
  document.addEventListener("keydown", (event) => {
    const modified = event.repeat || event.ctrlKey || event.altKey || event.metaKey;
    if (event.key in KEYS && !modified && event.target !== $("ballot")) {
      event.preventDefault();
      act(KEYS[event.key]);
    }
  });
  render();
}

if (typeof document !== "undefined") start(JSON.parse(document.getElementById("data").textContent));

"use strict";

/** What `reward` gives the picture of `label` beyond that of `reference`; null where a score is missing. */
function change(picture, reward, label, reference) {
  const [after, before] = [label, reference].map((who) => picture.scores[who][reward]);
  return after === null || before === null ? null : after - before;
}

/** Pictures by their change; those without one come last, equal ones keep their order. */
function sorted(pictures, order, changeOf) {
  if (order === "prompt") return [...pictures];
  const sign = order === "gain" ? -1 : 1;
  const key = (picture) => (changeOf(picture) === null ? Infinity : sign * changeOf(picture));
  return [...pictures].sort((a, b) => (key(a) === key(b) ? 0 : key(a) - key(b)));
}

/** A number with its sign; a dash where there is none. */
function signed(value, digits = 3) {
  return value === null ? "–" : (value < 0 ? "−" : "+") + Math.abs(value).toFixed(digits);
}

/** An estimate and its interval. */
function estimate({ value, low, high }, show) {
  if (value === null) return "–";
  return low === null ? show(value) : `${show(value)} [${show(low)}, ${show(high)}]`;
}

/** How many prompts there are, and how many pictures of each; every prompt has all seeds, and edits may share a text. */
function amount(pictures) {
  const counted = (count, what) => `${count} ${what}${count === 1 ? "" : "s"}`;
  const seeds = new Set(pictures.map((picture) => picture.seed)).size;
  return `${counted(pictures.length / seeds, "prompt")}, ${counted(seeds, "picture")} each`;
}

function start(data) {
  const $ = (id) => document.getElementById(id);
  const [reference, ...others] = data.labels;
  let shown = [];

  function element(tag, className, ...children) {
    const made = Object.assign(document.createElement(tag), { className });
    made.append(...children);
    return made;
  }

  function image(file, alt) {
    const made = Object.assign(new Image(), { alt });
    made.onload = () => made.classList.toggle("small", made.naturalWidth < 256);
    made.src = data.images[file];
    return made;
  }

  /** What was edited, where the pictures are edits of one. */
  function edited({ source, prompt }) {
    if (source === undefined) return [];
    return [element("div", "", image(source, `source: ${prompt}`), element("div", "score", element("span", "faint", "source")))];
  }

  function pair(picture) {
    return element("div", "row", ...edited(picture), ...data.labels.map((label) => {
      const score = picture.scores[label][$("reward").value];
      const text = element("div", "score", element("span", "faint", label), score === null ? "failed" : score.toFixed(3));
      return element("div", "", image(picture.files[label], `${label}: ${picture.prompt}`), text);
    }));
  }

  function heading(picture) {
    const value = change(picture, $("reward").value, $("label").value, reference);
    const tone = value > 0 ? "good" : value < 0 ? "bad" : "faint";
    return element("div", "text", element("span", "", picture.prompt), element("span", `change ${tone}`, signed(value)));
  }

  function render() {
    const changeOf = (picture) => change(picture, $("reward").value, $("label").value, reference);
    shown = sorted(data.pictures, $("order").value, changeOf);
    $("cards").replaceChildren(...shown.map((picture, position) => {
      const card = element("button", "card", heading(picture), pair(picture));
      card.onclick = () => enlarge(position);
      return card;
    }));
  }

  function enlarge(position) {
    const picture = shown[position];
    const foot = element("p", "faint", `${position + 1} of ${shown.length}, seed ${picture.seed}`);
    $("large").replaceChildren(heading(picture), pair(picture), foot);
    $("large").dataset.position = position;
    if (!$("large").open) $("large").showModal();
  }

  function move(step) {
    const cards = [...$("cards").children];
    const open = $("large").open;
    const now = open ? Number($("large").dataset.position) : cards.indexOf(document.activeElement);
    const next = Math.min(Math.max(now + step, 0), cards.length - 1);
    if (open) enlarge(next);
    cards[next].focus();
    cards[next].scrollIntoView({ block: "nearest" });
  }

  const columns = ["", "against", "reward", "before", "after", "difference (95% CI)", "win rate (95% CI)", "pairs", "failed"];
  const percent = (value) => `${(100 * value).toFixed(0)}%`;
  const plain = (value) => (value === null ? "–" : value.toFixed(3));
  $("summary").append(
    element("tr", "", ...columns.map((text) => element("th", "", text))),
    ...data.differences.map((d) => element("tr", "", ...[
      d.label, d.reference, d.reward, plain(d.before), plain(d.after),
      estimate(d.difference, signed), estimate(d.win_rate, percent), d.pairs, d.failed,
    ].map((text) => element("td", "", String(text))))),
  );
  const { path, num_steps, solver } = data.settings;
  $("about").textContent = `${path}, ${num_steps} ${solver} steps; ${amount(data.pictures)}; the same noise for all`;
  for (const [id, options] of [["reward", data.rewards], ["label", others]]) {
    $(id).append(...options.map((text) => new Option(text, text)));
  }
  $("choose-label").hidden = others.length < 2;
  $("cards").style.setProperty("--width", `${10 + 9 * data.labels.length}rem`);
  for (const id of ["reward", "label", "order"]) $(id).onchange = render;
  document.addEventListener("keydown", (event) => {
    const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (step && event.target.tagName !== "SELECT") {
      event.preventDefault();
      move(step);
    }
  });
  render();
}

if (typeof document !== "undefined") start(JSON.parse(document.getElementById("data").textContent));

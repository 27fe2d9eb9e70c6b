// Explorers that answer in the page: controls over a table that `cmpt site` computed. All words and
// numbers are the table's; here is only what shows them.
import triangle from "./vendor/triangle.js";

const SVG = "http://www.w3.org/2000/svg";

function element(name, attributes = {}, ...inner) {
  const found = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) found.setAttribute(key, value);
  found.append(...inner);
  return found;
}

function drawn(name, attributes, parent, text) {
  const found = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) found.setAttribute(key, value);
  if (text !== undefined) found.textContent = text;
  parent.append(found);
  return found;
}

function canvas(width, height, label) {
  const svg = document.createElementNS(SVG, "svg");
  for (const [key, value] of Object.entries({
    viewBox: `0 0 ${width} ${height}`,
    width,
    height,
    role: "img",
  }))
    svg.setAttribute(key, value);
  svg.setAttribute("aria-label", label);
  svg.setAttribute("font-size", 12);
  return svg;
}

function table(head, rows) {
  const kind = (cell) => (/[a-z]/i.test(cell) ? { class: "words" } : {});
  const row = (cells, tag) =>
    element("tr", {}, ...cells.map((cell) => element(tag, kind(cell), String(cell))));
  const inner = element(
    "table",
    {},
    element("thead", {}, row(head, "th")),
    element("tbody", {}, ...rows.map((cells) => row(cells, "td"))),
  );
  return element("div", { class: "wide", tabindex: 0 }, inner);
}

function command(assignments) {
  return element("pre", { class: "stream" }, ["cmpt run cpu", ...assignments].join(" \\\n    "));
}

// A straight axis: value -> place, with round ticks.
function axis(low, high, from, to) {
  const step = [0.1, 0.2, 0.5, 1, 2, 5, 10, 20].find((each) => (high - low) / each <= 6) ?? 50;
  const ticks = [];
  for (let n = Math.ceil(low / step); n * step <= high; n++) ticks.push(Number((n * step).toPrecision(6)));
  return { at: (value) => from + ((value - low) / (high - low)) * (to - from), ticks };
}

function frame(svg, x, y, [left, top, right, bottom], words) {
  for (const tick of x.ticks) {
    drawn("line", { x1: x.at(tick), x2: x.at(tick), y1: top, y2: bottom, stroke: "#8883" }, svg);
    drawn("text", { x: x.at(tick), y: bottom + 16, "text-anchor": "middle" }, svg, tick);
  }
  for (const tick of y.ticks) {
    drawn("line", { x1: left, x2: right, y1: y.at(tick), y2: y.at(tick), stroke: "#8883" }, svg);
    drawn("text", { x: left - 6, y: y.at(tick) + 4, "text-anchor": "end" }, svg, tick);
  }
  drawn("text", { x: (left + right) / 2, y: bottom + 34, "text-anchor": "middle" }, svg, words[0]);
  drawn("text", { x: left - 6, y: top - 9, "text-anchor": "start" }, svg, words[1]);
}

// The mixture triangle: anywidget's own module over a model that lives in the page.
function mixture(place, data) {
  const values = { value: [1 / 3, 1 / 3, 1 / 3], points: data.stored };
  const listeners = [];
  const model = {
    get: (name) => values[name],
    set: (name, value) => (values[name] = value),
    save_changes: () => listeners.forEach((listener) => listener()),
    on: (_, listener) => listeners.push(listener),
    off: (_, listener) => listeners.splice(listeners.indexOf(listener), 1),
  };
  const control = element("div");
  const plane = element("div");
  const said = element("output", { "aria-live": "polite" });
  const below = element("div");
  place.replaceChildren(element("div", { class: "side" }, control, plane), said, below);

  const spans = [0, 1].map((k) => data.stored.map((each) => each.scores[k]));
  const [low, high] = [Math.min, Math.max].map((pick) => spans.map((span) => pick(...span)));
  const box = [38, 26, 322, 246];
  const x = axis(low[0] - 3, high[0] + 3, box[0], box[2]);
  const y = axis(low[1] - 3, high[1] + 3, box[3], box[1]);

  function picture(scores) {
    const svg = canvas(
      340,
      286,
      "Scores between the stored runs, and the stored runs, A_KA to the right, A_ZS upwards",
    );
    frame(svg, x, y, box, ["A_KA (%)", "A_ZS (%)"]);
    for (const {
      scores: [ka, zs],
      name,
    } of data.stored) {
      drawn(
        "title",
        {},
        drawn("circle", { cx: x.at(ka), cy: y.at(zs), r: 4, fill: "var(--link)" }, svg),
        name,
      );
    }
    if (scores) {
      const [[ka, kaLow, kaHigh], [zs, zsLow, zsHigh]] = scores;
      const bar = { stroke: "#de8f05", "stroke-width": 2 };
      drawn("line", { x1: x.at(kaLow), x2: x.at(kaHigh), y1: y.at(zs), y2: y.at(zs), ...bar }, svg);
      drawn("line", { x1: x.at(ka), x2: x.at(ka), y1: y.at(zsLow), y2: y.at(zsHigh), ...bar }, svg);
      drawn("circle", { cx: x.at(ka), cy: y.at(zs), r: 8, fill: "#de8f05", stroke: "currentColor" }, svg);
    }
    return svg;
  }

  function update() {
    const found = data.points[values.value.map((share) => share.toFixed(3)).join("/")];
    plane.replaceChildren(picture(found.scores));
    const [ka, zs] = found.scores ?? [];
    const words = ([mean, lower, upper]) =>
      `${mean.toFixed(1)}% (${lower.toFixed(1)} to ${upper.toFixed(1)})`;
    const between = found.scores
      ? ` Between the stored runs: A_KA ${words(ka)}, A_ZS ${words(zs)}, 95% t-intervals over ${data.replicates} replicates. ` +
        `Interpolation adds to them: where a stored mixture is left out, it misses by ${data.misses.map((miss) => miss.toFixed(1)).join(" and ")} points.`
      : " No prediction: no stored mixtures lie around this one.";
    said.textContent = found.sentence + between;
    const rows = found.near.map(([n, far]) => {
      const { name, shares, scores } = data.stored[n];
      return [
        name,
        ...shares.map((share) => share.toFixed(2)),
        far.toFixed(2),
        ...scores.map((score) => score.toFixed(1)),
      ];
    });
    below.replaceChildren(
      table(["nearest stored", "P", "D", "B", "distance", "A_KA", "A_ZS"], rows),
      command(found.command),
    );
  }

  model.on("change:value", update);
  triangle.render({ model, el: control });
  update();
}

// The schedule explorer: the stored curve in multiples of the peak, times the peak.
function schedule(place, data) {
  const option = (value) => element("option", { value }, String(value));
  const names = [...new Set(data.curves.map((each) => each.name))];
  const name = element("select", {}, ...names.map(option));
  const meta = element("select");
  const lengths = Object.keys(data.curves[0].lengths);
  const tasks = element("select", {}, ...lengths.map(option));
  const peak = element("input", { type: "range", min: 0, max: data.peaks.length - 1, step: 1 });
  const peakSays = element("span");
  const hold = element("button", { type: "button" }, "Hold this one");
  const labelled = (words, control) => element("label", {}, words, control);
  const controls = element(
    "div",
    { class: "controls" },
    labelled("Schedule", name),
    labelled("Meta schedule", meta),
    labelled("Tasks", tasks),
    element("label", {}, peakSays, peak),
    hold,
  );
  const picture = element("div");
  const said = element("output", { "aria-live": "polite" });
  const below = element("div");
  place.replaceChildren(controls, picture, said, below);
  name.value = "cosine";
  tasks.value = "8";
  peak.value = data.peaks.indexOf(0.001);
  let held = null;

  function metas() {
    const before = meta.value;
    const possible = data.curves.filter((each) => each.name === name.value).map((each) => each.meta);
    meta.replaceChildren(...possible.map(option));
    meta.value = possible.includes(before) ? before : possible[0];
  }

  function line(svg, rates, x, y, style) {
    const points = rates.map(
      (rate, n) => `${x.at((n + 0.5) / data.steps).toFixed(1)},${y.at(rate * 1000).toFixed(1)}`,
    );
    drawn("polyline", { points: points.join(" "), fill: "none", "stroke-linejoin": "round", ...style }, svg);
  }

  function draw(rates) {
    const width = Math.max(320, Math.min(700, picture.clientWidth)); // letters stay as large on a phone
    const svg = canvas(width, 270, "The learning rate over the tasks");
    const all = held ? [...rates, ...held.rates] : rates;
    const box = [44, 26, width - 10, 226];
    const x = axis(0, Number(tasks.value), box[0], box[2]);
    const y = axis(0, 1050 * Math.max(...all), box[3], box[1]);
    frame(svg, x, y, box, ["Tasks", "Learning rate (10⁻³)"]);
    if (held)
      line(svg, held.rates, x, y, { stroke: "#858585", "stroke-width": 1.6, "stroke-dasharray": "5 3" });
    line(svg, rates, x, y, { stroke: "var(--link)", "stroke-width": 2 });
    picture.replaceChildren(svg);
  }

  const words = (value) => String(Number(value.toPrecision(3)));

  function update() {
    const curve = data.curves.find((each) => each.name === name.value && each.meta === meta.value);
    const shares = curve.lengths[tasks.value];
    const top = data.peaks[peak.value];
    peak.setAttribute("aria-valuetext", top);
    peakSays.textContent = `Peak: ${top}`;
    draw(shares.map((share) => share * top));
    const path = shares.reduce((sum, share) => sum + share, 0);
    const mean = path / shares.length;
    said.textContent =
      `Mean rate ${words(mean * top)} = ${mean.toFixed(2)} of the peak ${top}, over ${tasks.value} tasks x ${data.steps} steps; ` +
      `path length (the sum of all rates) ${words(path * top)}.` +
      (held ? ` Dashed: ${held.label}, mean rate ${words(held.mean)}.` : "");
    const rows = curve.near[peak.value].map(([n, far]) => {
      const { name: setting, scores, besides } = data.stored[n];
      return [setting, far, ...scores.map((score) => score.toFixed(1)), besides];
    });
    const head = ["nearest stored", "distance", "A_KA (%)", "A_ZS (%)", "differs also in"];
    const lacking = element("p", { class: "how" }, "The stored runs are of 8 tasks.");
    below.replaceChildren(tasks.value === "8" ? table(head, rows) : lacking);
  }

  hold.addEventListener("click", () => {
    const curve = data.curves.find((each) => each.name === name.value && each.meta === meta.value);
    const top = data.peaks[peak.value];
    const rates = curve.lengths[tasks.value].map((share) => share * top);
    const mean = rates.reduce((sum, rate) => sum + rate, 0) / rates.length;
    held = { rates, mean, label: `${name.value}, meta ${meta.value}, peak ${top}` };
    update();
  });
  tasks.addEventListener("change", () => (held = null));
  name.addEventListener("change", metas);
  metas();
  for (const control of [name, meta, tasks, peak]) control.addEventListener("input", update);
  name.addEventListener("change", update);
  tasks.addEventListener("change", update);
  update();
}

const explorers = { mixture, schedule };

for (const place of document.querySelectorAll("[data-explorer]")) {
  const answer = await fetch(place.dataset.source);
  if (!answer.ok) continue; // the still stays
  explorers[place.dataset.explorer](place, await answer.json());
  place.dataset.ready = "";
}

// Drawings: axes, handles that are dragged, and the plane of A_KA and A_ZS.
import d3 from "./d3.js";
import { ARROWS, element, INDEX, points, roving, say, signed } from "./form.js";

export { d3 };

// Words in a drawing, with the index of A_KA and A_ZS set low.
export function write(texts, wordsOf) {
  join(texts, "tspan", (d) => wordsOf(d).split(INDEX))
    .attr("dy", (_, n) => n && (n % 2 ? 3 : -3))
    .attr("font-size", (_, n) => (n % 2 ? 9 : null))
    .text((part) => part);
}

// The children of a kind that a part of a drawing has, one for each row of data.
export const join = (parent, tag, data) => parent.selectAll(tag).data(data).join(tag);

// The one part of a drawing that is called so.
export const group = (parent, name) =>
  parent.selectAll(`g.${name}`).data([0]).join("g").attr("class", name);

// What is drawn is named where a pointer rests on it.
export const hovered = (parts) => join(parts, "title", (d) => [d]).text((d) => d.label);

// A drawing that fills the width of its place, at most `most` wide.
export function drawing(place, height, label, most = 720) {
  const width = Math.max(280, Math.min(most, place.clientWidth || most));
  return join(d3.select(place), "svg", [0])
    .attr("viewBox", `0 0 ${width} ${height}`)
    .attr("width", width)
    .attr("height", height)
    .attr("role", "group")
    .attr("aria-label", label)
    .property("extent", [width, height]);
}

// Axes are drawn anew only when they change: of what moves with a pointer, they cost most.
export function axes(svg, x, y, [xLabel, yLabel], ticks = 6, named = null) {
  const [left, right] = x.range();
  const [bottom, top] = y.range();
  const both = group(svg, "axes").lower();
  const drawn = JSON.stringify([x.domain(), y.domain(), left, right, bottom, top, xLabel, yLabel]);
  if (both.property("drawn") === drawn) return;
  both.property("drawn", drawn);
  const across = d3.axisBottom(x).ticks(ticks).tickSize(top - bottom).tickPadding(8);
  const up = d3.axisLeft(y).ticks(5).tickFormat(named).tickSize(left - right).tickPadding(6);
  group(both, "x").attr("transform", `translate(0,${bottom})`).call(across);
  group(both, "y").attr("transform", `translate(${left},0)`).call(up);
  const words = [
    [xLabel, (left + right) / 2, bottom + 34, "middle"],
    [yLabel, left - 34, top - 10, "start"],
  ];
  both
    .selectAll("text.name")
    .data(words)
    .join("text")
    .attr("class", "name")
    .attr("x", (d) => d[1])
    .attr("y", (d) => d[2])
    .attr("text-anchor", (d) => d[3])
    .call(write, (d) => d[0]);
}

// Handles: circles with room for a finger around them, one for each row of data {key, x, y, name, now,
// words}. They are sliders for the keyboard and for who listens. `move` gets the pointer's place in the
// drawing, `nudge` the two directions of a key. What listens is bound once, when a handle is made: a drag
// goes on while its drawing is drawn anew. Where there are many, `led` names the keys that lead to the next.
const FINGER = 14; // radius, in pixels
export function handles(layer, data, radius, { move, nudge, led = null }) {
  const made = layer
    .selectAll("g.handle")
    .data(data, (d) => d.key)
    .join((entered) => {
      const fresh = entered.append("g").attr("class", (d) => `handle ${d.key}`).attr("role", "slider").attr("tabindex", 0);
      fresh.append("circle").attr("class", "finger").attr("r", FINGER);
      fresh.append("circle").attr("class", "knob").attr("r", radius);
      return fresh.each(listen);
    });
  made
    .attr("transform", (d) => `translate(${d.x},${d.y})`)
    .attr("aria-label", (d) => d.name)
    .attr("aria-valuemin", (d) => d.least ?? null)
    .attr("aria-valuemax", (d) => d.most ?? null)
    .attr("aria-valuenow", (d) => d.now)
    .attr("aria-valuetext", (d) => d.words)
    .property("told", () => ({ move, nudge, led }));
  if (led && data.length) roving(layer.node(), ".handle", led);
  return made;
}

let holding = null; // the handle that a pointer holds, on the whole page
export const isHeld = () => holding !== null;

function listen() {
  const handle = this;
  let held = null; // from the pointer to the middle of the handle
  const at = (event) => d3.pointer(event, handle.ownerSVGElement);
  const now = () => d3.select(handle).datum();
  handle.addEventListener("pointerdown", (event) => {
    if (event.button) return;
    event.preventDefault();
    handle.focus({ preventScroll: true });
    handle.setPointerCapture(event.pointerId);
    const [x, y] = at(event);
    held = [now().x - x, now().y - y];
    holding = handle;
  });
  handle.addEventListener("pointermove", (event) => {
    if (!held) return;
    const [x, y] = at(event);
    handle.told.move(x + held[0], y + held[1], now());
  });
  for (const end of ["pointerup", "pointercancel", "lostpointercapture"])
    handle.addEventListener(end, () => (held = holding = null));
  // a page that scrolls under a finger would take the drag for itself
  handle.addEventListener("touchstart", (event) => event.preventDefault(), { passive: false });
  handle.addEventListener("keydown", (event) => {
    const way = ARROWS[event.key];
    if (!way || handle.told.led?.includes(event.key)) return;
    event.preventDefault();
    event.stopPropagation();
    handle.told.nudge(...way, now());
  });
}

// The plane of A_KA and A_ZS. `stored` are settings {label, at, half}, `dots` single runs [A_KA, A_ZS],
// `front` a line of places; of the layers that move, `predicted` is {at, half}, `own` are runs
// {at, trail, colour, label}, and `guess` is {key, from, at, to}, the reader's and the way to where it
// ended; `key` says what the layers are. While a reader guesses, `guessing` is the place so far, which a
// click, a drag or arrow keys move: `pick` gets it; stored settings can be `veiled` then.
const KEY = {
  stored: "stored setting",
  dots: "single run",
  front: "plain fine-tuning’s front",
  pinned: "chosen or pinned",
  predicted: "predicted",
  own: "your run",
  guess: "your guess",
};
export function plane(place, { preview, choose, pick, key = {} }) {
  const label = "Where runs end: new knowledge, A_KA, to the right; what was kept, A_ZS, upwards";
  let drawn = ""; // of what does not move
  let scales = null;

  function drawStill(svg, { stored, dots, front }, places) {
    const [width, height] = svg.property("extent");
    const span = (k) => {
      const [low = 30, high = 60] = d3.extent(places, (d) => d[k]);
      return [low - 1.5, high + 1.5];
    };
    const x = d3.scaleLinear(span(0), [44, width - 10]);
    const y = d3.scaleLinear(span(1), [height - 44, 26]);
    scales = { x, y, line: d3.line((d) => x(d[0]), (d) => y(d[1])), at: (d) => `translate(${x(d[0])},${y(d[1])})` };
    axes(svg, x, y, ["A_KA (%), what is new", "A_ZS (%), what was known"]);
    join(group(svg, "front"), "path", [front]).attr("d", scales.line);
    join(group(svg, "dots"), "circle", dots).attr("r", 2.5).attr("transform", scales.at);
    const layer = group(svg, "stored");
    bars(layer, stored);
    const buttons = join(layer, "g", d3.sort(stored, (d) => d.at[0]))
      .attr("role", "button")
      .attr("class", "place")
      .attr("aria-label", (d) => `${d.label}: A_KA ${points(d.at[0])}, A_ZS ${points(d.at[1])}`)
      .attr("transform", (d) => scales.at(d.at))
      .on("mouseenter focus", (_, d) => preview(d))
      .on("mouseleave blur", () => preview(null))
      .on("click", (_, d) => choose(d))
      .on("keydown", (event, d) => ["Enter", " "].includes(event.key) && (event.preventDefault(), choose(d)))
      .call(hovered);
    join(buttons, "circle", (d) => [d]).attr("r", 4.5);
    if (stored.length) roving(layer.node(), ".place");
  }

  // No interval leaves the plane.
  function bars(layer, data) {
    const { x, y } = scales;
    const [inX, inY] = [x.copy().clamp(true), y.copy().clamp(true)];
    join(layer, "path", data).attr("d", ({ at: [a, b], half }) => {
      const [wide, high] = half ?? [0, 0];
      const across = `M${inX(a - wide)},${y(b)}H${inX(a + wide)}`;
      return `${across}M${x(a)},${inY(b - high)}V${inY(b + high)}`;
    });
  }

  return ({ stored = [], dots = [], front = [], predicted, own = [], pinned = [], guess, guessing = null, veiled = false }) => {
    const svg = drawing(place, 330, label);
    const seen = [...stored.map((d) => d.at), ...dots, ...front, ...own.flatMap((d) => d.trail)];
    const places = guess?.to ? [...seen, guess.at, guess.to] : seen;
    const still = JSON.stringify([svg.property("extent"), stored.map((d) => d.label), places]);
    if (still !== drawn) drawStill(svg, { stored, dots, front }, places);
    drawn = still;
    const { x, y, line, at } = scales;
    group(svg, "stored").attr("display", veiled ? "none" : null);
    const inside = (place) => [x, y].map((scale, k) => Math.min(scale.domain()[1], Math.max(scale.domain()[0], place[k])));
    const put = (px, py) => pick(inside([x.invert(px), y.invert(py)]));
    svg.classed("guessing", Boolean(guessing)).on("click", (event) => guessing && put(...d3.pointer(event, svg.node())));
    const [a, b] = guessing ?? [];
    const words = guessing && `A_KA ${points(a)}, A_ZS ${points(b)}`;
    const mark = { key: "mine", name: "Where you think it ends", now: a, words, x: x(a), y: y(b) };
    handles(group(svg, "guessed"), guessing ? [mark] : [], 7, {
      move: put,
      nudge: (right, up) => pick(inside([a + 0.5 * right, b + 0.5 * up])),
    });
    join(group(svg, "pinned"), "circle", pinned)
      .attr("r", 8)
      .attr("transform", (d) => at(d.at))
      .attr("stroke", (d) => d.colour);
    const guesses = predicted ? [predicted] : [];
    const layer = group(svg, "predicted").attr("opacity", predicted?.weight ?? 1);
    bars(layer, guesses);
    join(layer, "circle", guesses)
      .attr("r", 6.5)
      .attr("transform", (d) => at(d.at));
    const runs = join(group(svg, "own"), "g", own).attr("stroke", (d) => d.colour);
    join(runs, "path", (d) => [d.trail]).attr("d", line);
    join(runs, "circle", (d) => d.trail.map((each, k) => ({ at: each, last: k === d.trail.length - 1, d })))
      .attr("r", (d) => (d.last ? 6 : 2))
      .attr("fill", (d) => d.d.colour)
      .attr("transform", (d) => at(d.at));
    const made = group(svg, "guess");
    join(made, "path", guess ? [guess] : []).attr("d", (d) => line([d.at, d.to]));
    join(made, "circle", guess ? [guess] : [])
      .attr("r", 7)
      .attr("transform", (d) => at(d.at));
    walk(svg, guess, x, y);
    const layers = { stored: veiled ? [] : stored, dots, front, pinned, predicted: guesses, own, guess: guess ? [guess] : [] };
    const named = Object.entries({ ...KEY, ...key }).filter(([name]) => layers[name].length);
    const names = named.map(([name, words]) => element("span", { class: `of-${name}` }, words));
    const old = place.querySelector(".key");
    if (old?.children.length === names.length && names.every((each, n) => each.isEqualNode(old.children[n]))) return;
    old?.remove();
    place.append(element("p", { class: "key" }, ...names));
  };
}

// A dot walks once from where a stream begins to where the run ended.
const WALK = 1400; // milliseconds
function walk(svg, guess, x, y) {
  const layer = group(svg, "walker");
  const isNew = guess && layer.property("walked") !== guess.key;
  if (!guess) layer.selectAll("*").remove();
  layer.property("walked", guess?.key);
  if (!isNew) return;
  const dot = join(layer, "circle", [0]).attr("r", 6);
  const from = [x, y].map((scale, k) => Math.max(scale.domain()[0], Math.min(scale.domain()[1], (guess.from ?? guess.at)[k])));
  const way = d3.interpolateArray(from, guess.to);
  const still = matchMedia("(prefers-reduced-motion: reduce)").matches;
  const put = (share) => {
    const [a, b] = way(share);
    dot.attr("transform", `translate(${x(a)},${y(b)})`);
  };
  put(1);
  if (still) return;
  const begun = performance.now();
  (function step() {
    const share = Math.min(1, (performance.now() - begun) / WALK);
    put(d3.easeCubicInOut(share));
    if (share < 1 && layer.property("walked") === guess.key) requestAnimationFrame(step);
  })();
}

// One setting minus another, paired by replicate: the stored differences, and those of one's own runs.
// Streams of one base are averaged before an interval is made, and none is made before all are stored.
export function comparison(place, one, other, { bases, factors }) {
  const shared = Object.keys(one.ends ?? {}).filter((key) => key in (other.ends ?? {}));
  const stored = shared.map((key) => [0, 1].map((k) => one.ends[key][k] - other.ends[key][k]));
  const planned = Math.min(one.planned ?? 0, other.planned ?? 0);
  const own = one.own && other.own ? [0, 1].map((k) => one.own[k] - other.own[k]) : null;
  if (!stored.length && !own) return place.replaceChildren();
  const names = ["A_KA", "A_ZS"];
  const sentences = names.map((name, k) => {
    const values = d3.rollups(
      stored,
      (some) => d3.mean(some, (pair) => pair[k]),
      (_, n) => bases[shared[n]],
    );
    const of = values.map(([, value]) => value);
    const mean = d3.mean(of) ?? Number.NaN;
    const half = (factors[of.length] * d3.deviation(of)) / Math.sqrt(of.length);
    const interval = stored.length < planned ? "" : ` (${points(mean - half)} to ${points(mean + half)})`;
    const known = of.length > 1 ? [signed(mean) + interval] : [];
    return `${name} ${[...known, ...(own ? [`your two runs ${signed(own[k])}`] : [])].join(", ")}`;
  });
  const count = stored.length < planned ? `${stored.length} of ${planned}` : `${stored.length}`;
  const means = stored.length ? `; means of ${count} stored pairs, with intervals over bases` : "";
  const said = element("p", { class: "difference" });
  say(said, `${one.label} minus ${other.label}, in points${means}: ${sentences.join("; ")}.`);
  const strip = element("div", { class: "strip" });
  place.replaceChildren(said, strip);
  const svg = drawing(strip, 92, "Stored paired differences, and yours", 620);
  const [width] = svg.property("extent");
  const all = [...stored.flat(), ...(own ?? []), 0];
  const x = d3.scaleLinear(d3.extent(all), [60, width - 16]).nice();
  const row = (k) => 22 + 24 * k;
  svg.append("g").attr("transform", "translate(0,62)").attr("class", "axes").call(d3.axisBottom(x).ticks(7));
  svg.append("path").attr("class", "zero").attr("d", `M${x(0)},8V62`);
  names.forEach((name, k) => {
    svg
      .append("text")
      .attr("x", 8)
      .attr("y", row(k) + 4)
      .datum(name)
      .call(write, (d) => d);
    join(svg.append("g").attr("class", "dots"), "circle", stored)
      .attr("r", 3.5)
      .attr("cx", (d) => x(d[k]))
      .attr("cy", row(k));
    if (own)
      svg
        .append("path")
        .attr("class", "mine")
        .attr("d", d3.symbol(d3.symbolDiamond, 90)())
        .attr("transform", `translate(${x(own[k])},${row(k)})`);
  });
}

// Drawings: axes, handles that are dragged, and the plane of A_KA and A_ZS.
import d3 from "./d3.js";
import { ARROWS, element, INDEX, points, roving, signed, table } from "./form.js";

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
export const hovered = (parts) => join(parts, "title", (d) => [d]).text((d) => d.name ?? d.label);

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
// drawing, `nudge` the two directions of a key, and `end`, where there is one, whether it
// was End or Home. What listens is bound once, when a handle is made: a drag
// goes on while its drawing is drawn anew. Where there are many, `led` names the keys that lead to the next.
const FINGER = 14; // radius, in pixels
export function handles(layer, data, radius, { move, nudge, end = null, led = null }) {
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
    .property("told", () => ({ move, nudge, end, led }));
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
    const { end } = handle.told;
    if (end && ["Home", "End"].includes(event.key)) return event.preventDefault(), end(event.key === "End");
    const way = ARROWS[event.key];
    if (!way || handle.told.led?.includes(event.key)) return;
    event.preventDefault();
    event.stopPropagation();
    handle.told.nudge(...way, now());
  });
}

// The plane of A_KA and A_ZS. `stored` are settings {name, at, half}, `dots` single runs [A_KA, A_ZS],
// `front` a line of places; of the layers that move, `predicted` is {at, half}, `pinned` are {at, half, colour},
// `own` are runs {at, trail, colour, label}, and `guess` is {key, at, to}, the reader's and where it ended;
// `key` says what the layers are. While a reader guesses, `guessing` is {at}, the place so far, or null before
// there is one, which a click, a drag or arrow keys move: `pick` gets it; stored settings can be `veiled` then.
// At other times a click at a stored setting chooses it, and elsewhere it is a `miss`.
const KEY = {
  stored: "stored setting",
  dots: "single run",
  front: "front of plain fine-tuning, with replay by thirds",
  pinned: "chosen or pinned",
  predicted: "predicted",
  own: "your run",
  guess: "your guess",
  walker: "the answer to your guess",
};
const NEAR = 14; // pixels from a stored setting within which a click chooses it
export function plane(place, { preview, choose, pick, miss = () => {}, key = {} }) {
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
    const over = (d) => (name(svg, d), preview(d));
    const buttons = join(layer, "g", d3.sort(stored, (d) => d.at[0]))
      .attr("role", "button")
      .attr("class", "place")
      .attr("aria-label", (d) => `${nameOf(d)}: A_KA ${points(d.at[0])}, A_ZS ${points(d.at[1])}`)
      .attr("transform", (d) => scales.at(d.at))
      .on("mouseenter focus", (_, d) => over(d))
      .on("mouseleave blur", () => over(null))
      .on("click", (event, d) => (event.stopPropagation(), over(null), choose(d)))
      .on("keydown", (event, d) => ["Enter", " "].includes(event.key) && (event.preventDefault(), choose(d)));
    join(buttons, "circle", (d) => [d]).attr("r", 4.5);
    if (stored.length) roving(layer.node(), ".place");
  }
  const nameOf = (d) => d.name ?? d.label;

  // The name and the interval of the setting that the pointer is over.
  function name(svg, d) {
    const { x, y } = scales;
    const layer = group(svg, "over").raise();
    const shown = d ? [d] : [];
    bars(layer, shown);
    const isRight = d && x(d.at[0]) > d3.mean(x.range());
    join(layer, "text", shown)
      .attr("x", x(d?.at[0] ?? 0) + (isRight ? -9 : 9))
      .attr("y", y(d?.at[1] ?? 0) - 8)
      .attr("text-anchor", isRight ? "end" : "start")
      .text(nameOf);
  }

  // No interval leaves the plane.
  function bars(layer, data) {
    const { x, y } = scales;
    const [inX, inY] = [x.copy().clamp(true), y.copy().clamp(true)];
    join(layer, "path", data)
      .attr("stroke", (d) => d.colour ?? null)
      .attr("d", ({ at: [a, b], half }) => {
        const [wide, high] = half ?? [0, 0];
        const across = `M${inX(a - wide)},${y(b)}H${inX(a + wide)}`;
        return `${across}M${x(a)},${inY(b - high)}V${inY(b + high)}`;
      });
  }

  // The corner of the plane that is farthest from everything stored.
  function corner(seen) {
    const { x, y } = scales;
    const [across, up] = [x, y].map((scale) => [0.08, 0.92].map((share) => d3.interpolate(...scale.domain())(share)));
    const distance = ([a, b]) => d3.min(seen, (d) => Math.hypot(x(d[0]) - x(a), y(d[1]) - y(b)));
    return d3.greatest(d3.cross(across, up), distance);
  }

  return ({ stored = [], dots = [], front = [], predicted, own = [], pinned = [], guess, guessing = null, veiled = false }) => {
    const svg = drawing(place, 330, label);
    const seen = [...stored.map((d) => d.at), ...dots, ...front, ...own.flatMap((d) => d.trail)];
    const places = guess ? [...seen, guess.at, guess.to] : seen;
    const still = JSON.stringify([svg.property("extent"), stored.map((d) => d.label), places]);
    if (still !== drawn) drawStill(svg, { stored, dots, front }, places);
    drawn = still;
    const { x, y, line, at } = scales;
    const inside = (place) => [x, y].map((scale, k) => Math.min(scale.domain()[1], Math.max(scale.domain()[0], place[k])));
    const put = (px, py) => pick(inside([x.invert(px), y.invert(py)]));
    svg.classed("guessing", Boolean(guessing)).on("click", (event) => {
      if (guessing?.at && event.target.closest(".handle")) return; // the end of a drag
      const [px, py] = d3.pointer(event, svg.node());
      if (guessing) return put(px, py);
      const near = d3.least(stored, (d) => Math.hypot(x(d.at[0]) - px, y(d.at[1]) - py));
      near && Math.hypot(x(near.at[0]) - px, y(near.at[1]) - py) < NEAR ? choose(near) : miss();
    });
    const [a, b] = guessing ? (guessing.at ?? corner(seen)) : [];
    const words = guessing?.at ? `A_KA ${points(a)}, A_ZS ${points(b)}` : "not placed yet";
    const mark = { key: "mine", name: "Where you think it ends", now: a, words, x: x(a), y: y(b) };
    const ring = handles(group(svg, "guessed"), guessing ? [mark] : [], 7, {
      move: put,
      nudge: (right, up) => pick(inside([a + 0.5 * right, b + 0.5 * up])),
    });
    ring.classed("open", !guessing?.at);
    const layer = group(svg, "pinned");
    bars(layer, pinned);
    join(layer, "circle", pinned)
      .attr("r", 8)
      .attr("transform", (d) => at(d.at))
      .attr("stroke", (d) => d.colour);
    const guesses = predicted ? [predicted] : [];
    const soft = group(svg, "predicted").attr("opacity", predicted?.weight ?? 1);
    bars(soft, guesses);
    join(soft, "circle", guesses)
      .attr("r", 6.5)
      .attr("transform", (d) => at(d.at));
    const runs = join(group(svg, "own"), "g", own).attr("stroke", (d) => d.colour);
    join(runs, "path", (d) => [d.trail]).attr("d", line);
    join(runs, "circle", (d) => d.trail.map((each, k) => ({ at: each, last: k === d.trail.length - 1, d })))
      .attr("r", (d) => (d.last ? 6 : 2))
      .attr("fill", (d) => d.d.colour)
      .attr("transform", (d) => at(d.at));
    const told = guess ? [guess] : [];
    const made = group(svg, "guess");
    join(made, "path", told).attr("d", (d) => line([d.at, d.to]));
    join(made, "circle", told)
      .attr("r", 7)
      .attr("transform", (d) => at(d.at));
    walk(svg, guess, at);
    const layers = { stored: veiled ? [] : stored, dots, front, pinned, predicted: guesses, own, guess: told, walker: told };
    const named = Object.entries({ ...KEY, ...key }).filter(([name]) => layers[name].length);
    const names = named.map(([name, words]) => element("span", { class: `of-${name}` }, words));
    const old = place.querySelector(".key");
    if (old?.children.length === names.length && names.every((each, n) => each.isEqualNode(old.children[n]))) return;
    old?.remove();
    place.append(element("p", { class: "key" }, ...names));
  };
}

// A dot walks once from the reader's guess to where the run ended; each drawing goes on with it.
const WALK = 1000; // milliseconds
function walk(svg, guess, at) {
  const layer = group(svg, "walker");
  const dot = join(layer, "circle", guess ? [guess] : []).attr("r", 4);
  if (layer.property("walked") !== guess?.key) layer.property("begun", performance.now());
  layer.property("walked", guess?.key);
  if (!guess) return;
  const way = d3.interpolateArray(guess.at, guess.to);
  const isStill = matchMedia("(prefers-reduced-motion: reduce)").matches;
  (function step() {
    const share = isStill ? 1 : Math.min(1, (performance.now() - layer.property("begun")) / WALK);
    dot.attr("transform", at(way(d3.easeCubicInOut(share))));
    if (share < 1 && dot.datum() === guess) requestAnimationFrame(step); // until the next drawing
  })();
}

// The first pin minus each other one, as a table, and of stored pairs a strip of the differences by replicate.
// Streams of one base are averaged before an interval is made, and none is made before all are stored. The
// answer is whether two predictions are nearer to each other than they are known.
export function compare(place, [one, ...others], data) {
  const rows = others.map((other) => ({ other, ...difference(one, other, data) }));
  const own = others
    .filter((other) => one.own && other.own)
    .map((other) => [other.label, ...[0, 1].map((k) => signed(one.own[k] - other.own[k])), "–", "your two runs"]);
  const head = [`${one.label}, minus`, "A_KA", "A_ZS", "A_ZS at equal A_KA", "from"];
  const cells = rows.filter((row) => row.from).map(({ other, scores, gain, from }) => [other.label, ...scores, gain, from]);
  if (!cells.length && !own.length) return place.replaceChildren();
  place.replaceChildren(table(head, [...cells, ...own]));
  for (const { other, stored } of rows) {
    const mine = one.own && other.own && [0, 1].map((k) => one.own[k] - other.own[k]);
    if (!stored.length && !mine) continue;
    if (others.length > 1) place.append(element("p", { class: "how" }, `${one.label}, minus ${other.label}`));
    strip(place, stored, mine);
  }
  return rows.some((row) => row.isClose);
}

function difference(one, other, { bases, factors, misses }) {
  const shared = Object.keys(one.ends ?? {}).filter((key) => key in (other.ends ?? {}));
  const stored = shared.map((key) => [0, 1].map((k) => one.ends[key][k] - other.ends[key][k]));
  const planned = Math.min(one.planned ?? 0, other.planned ?? 0);
  const told = (mean, values) => {
    const half = (factors[values.length] * d3.deviation(values)) / Math.sqrt(values.length);
    return signed(mean) + (half && stored.length >= planned ? ` (${points(mean - half)} to ${points(mean + half)})` : "");
  };
  if (stored.length > 1) {
    const scores = [0, 1].map((k) => {
      const means = d3.rollups(stored, (some) => d3.mean(some, (pair) => pair[k]), (_, n) => bases[shared[n]]);
      const values = means.map(([, value]) => value);
      return told(d3.mean(values), values);
    });
    const both = Object.keys(one.gain?.bases ?? {}).filter((base) => base in (other.gain?.bases ?? {}));
    const gain = both.length
      ? told(one.gain.value - other.gain.value, both.map((base) => one.gain.bases[base] - other.gain.bases[base]))
      : "–";
    const count = stored.length < planned ? `${stored.length} of ${planned}` : stored.length;
    return { stored, scores, gain, from: `${count} stored pairs` };
  }
  if (!one.at || !other.at) return { stored };
  const apart = [0, 1].map((k) => one.at[k] - other.at[k]);
  const errors = misses.map((miss) => miss * Math.sqrt(!one.ends + !other.ends));
  const isClose = apart.every((each, k) => Math.abs(each) < errors[k]);
  return { stored, scores: apart.map((each, k) => `${signed(each)} ± ${points(errors[k])}`), gain: "–", from: "predicted", isClose };
}

function strip(place, stored, own) {
  const made = element("div", { class: "strip" });
  place.append(made);
  const svg = drawing(made, 92, "Stored paired differences, and yours", 620);
  const [width] = svg.property("extent");
  const all = [...stored.flat(), ...(own ?? []), 0];
  const x = d3.scaleLinear(d3.extent(all), [60, width - 16]).nice();
  const row = (k) => 22 + 24 * k;
  svg.append("g").attr("transform", "translate(0,62)").attr("class", "axes").call(d3.axisBottom(x).ticks(7));
  svg.append("path").attr("class", "zero").attr("d", `M${x(0)},8V62`);
  ["A_KA", "A_ZS"].forEach((name, k) => {
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

// The atlas: every run as a dot in the plane of A_KA and A_ZS, and the settings of those in a box.
import { keywords, takeAway } from "./export.js";
import { ARROWS, button, element, form, picture, places, points, roving, say, table } from "./form.js";
import { axes, d3, drawing, group } from "./plane.js";
import { SILENT } from "./runs.js";
import { among, canonical, COLOURS, differing, listOf, within } from "./state.js";
import { frame } from "./workbench.js";

const PALETTE = COLOURS.slice(0, 4);
const ALL = "all";
const CLASSES = 2 * PALETTE.length; // numbered from 1: each colour as a disc, then as a ring
const [OTHERS, OWN] = [0, CLASSES + 1];
const [GREY, VERMILION] = ["#8c8c8c", "#d55e00"];
const AREA = 26; // of a dot, in square pixels
const [SOLID, EDGE] = [0.6, 0.01]; // opacity of a dot; share of runs that may lie beyond an edge
const FADED = 0.2; // opacity of dots outside the box
const ROWS = 25; // of the list; more would neither be read nor drawn within a frame
const SHARE = 0.05; // of the plane: half a new box, and what a key moves it by
const NEAR = 6; // pixels from a click to the dot that it means
const STILL = 3; // pixels that a click may move
const GROWTHS = { "+": 1.25, "=": 1.25, "-": 0.8 };

// A dot of each class as a picture, whose copies are drawn faster than paths.
function pictures(ratio, ink) {
  return d3.range(OWN + 1).map((n) => {
    const size = { width: 16 * ratio, height: 16 * ratio, style: "width:16px;height:16px" };
    const made = element("canvas", size);
    const context = made.getContext("2d");
    const isRing = n > PALETTE.length && n <= CLASSES;
    const fill = n === OWN ? VERMILION : n === OTHERS ? GREY : PALETTE[(n - 1) % PALETTE.length];
    Object.assign(context, { fillStyle: fill, strokeStyle: isRing ? fill : ink, lineWidth: isRing ? 2 : 1 });
    context.setTransform(ratio, 0, 0, ratio, 8 * ratio, 8 * ratio);
    context.globalAlpha = n === OWN ? 1 : SOLID;
    const area = n === OWN ? 2.5 * AREA : n === OTHERS ? AREA / 2 : AREA;
    context.beginPath();
    d3.symbol(n === OWN ? d3.symbolDiamond2 : d3.symbolCircle, area).context(context)();
    if (!isRing) context.fill();
    if (isRing || n === OWN) context.stroke();
    return made;
  });
}

export function explore(el, { table: data, kernel, start }) {
  const { fields, settings, runs, verdicts } = data;
  const keys = Object.keys(fields);
  const setting = Uint16Array.from(runs, (run) => run[0]);
  const scores = [2, 3].map((k) => Float32Array.from(runs, (run) => run[k]));
  const totals = d3.rollup(
    runs,
    (own) => ({ count: own.length, means: [2, 3].map((k) => d3.mean(own, (run) => run[k])) }),
    (run) => run[0],
  );
  const valueOf = (n, key) => String(settings[n][key]);
  // The values of each field with their numbers of runs, the most frequent first.
  const frequencies = (of, key) => d3.sort(d3.rollup(of, (own) => own.length, key), (pair) => -pair[1]);
  const values = new Map(keys.map((key) => [key, frequencies(runs, (run) => valueOf(run[0], key))]));
  const options = (key) => [[ALL, ALL], ...values.get(key).map(([value, n]) => [value, `${value} (${n})`])];
  const filters = keys.map((key) => ({ key, label: fields[key], options: options(key) }));
  const place = places(el, ["presets", "controls", "atlas", "legend", "said", "warned", "list", "about", "away"]);
  const [canvas, all] = [element("canvas", { "aria-hidden": true }), element("canvas")];
  const nameOf = ({ study, name }) => `${study}: ${name}`; // in links, which outlive places in the table
  const every = Object.fromEntries(keys.map((key) => [key, ALL]));
  const defaults = { ...every, ...data.defaults, box: null, picked: "" };
  const isPair = (value) => listOf(within([0, 100]))(value) && value.length === 2;
  const isBox = (value) => value === null || [value?.at, value?.half].every(isPair);
  const kinds = {
    ...Object.fromEntries(keys.map((key) => [key, among([ALL, ...values.get(key).map(([value]) => value)])])),
    colour: among(keys),
    box: isBox,
    picked: among(["", ...settings.map(nameOf)]),
  };
  const rules = { defaults, settle: (state) => state, keyOf: canonical };
  const bench = frame(el, { name: "atlas", rules, kinds, kernel, start, place, draw });
  let view = null; // what does not depend on the box
  let looked = "";
  let listed = "";
  const change = (changes) => bench.act({ change: changes });
  const state = new Proxy({}, { get: (_, key) => bench.model.state[key] });

  function draw(everything) {
    const { box, picked, ...shown } = bench.model.state;
    const needs = canonical([shown, place.controls.clientWidth]);
    if (needs !== looked) look();
    looked = needs;
    update();
    if (everything) bench.drawn();
  }

  function look() {
    const words = "Where runs end: new knowledge, A_KA, to the right; what was kept, A_ZS, upwards";
    const svg = drawing(place.atlas, 420, words, 1100);
    const [width, height] = svg.property("extent");
    const ratio = window.devicePixelRatio || 1;
    const span = (of) => [d3.quantile(of, EDGE) - 1, d3.max(of) + 1];
    const x = d3.scaleLinear(span(scores[0]), [44, width - 10]).clamp(true);
    const y = d3.scaleLinear(span(scores[1]), [height - 44, 26]).clamp(true);
    const ranks = new Map(
      values.get(state.colour).map(([value], rank) => [value, rank < CLASSES ? rank + 1 : OTHERS]),
    );
    const classes = settings.map((each, n) => (each.own ? OWN : ranks.get(valueOf(n, state.colour))));
    const shown = settings.map((_, n) => keys.every((key) => [ALL, valueOf(n, key)].includes(state[key])));
    // rare classes lie above frequent ones, and one's own runs on top
    const order = d3.sort(
      d3.range(runs.length).filter((n) => shown[setting[n]]),
      (n) => classes[setting[n]],
    );
    const [px, py] = [x, y].map((scale, k) => Float32Array.from(scores[k], scale));
    const dots = pictures(ratio, getComputedStyle(el).color);
    for (const each of [canvas, all]) Object.assign(each, { width: width * ratio, height: height * ratio });
    Object.assign(canvas.style, { width: `${width}px`, height: `${height}px` });
    axes(svg, x, y, ["A_KA (%), what is new", "A_ZS (%), what was known"], 8);
    legend(dots, classes);
    view = { x, y, px, py, classes, order: Uint32Array.from(order), dots, ratio, move: brush(svg, x, y) };
    paint(all, view.order);
  }

  function paint(on, chosen) {
    const { dots, classes, px, py, ratio } = view;
    const context = on.getContext("2d");
    for (const n of chosen)
      context.drawImage(dots[classes[setting[n]]], (px[n] - 8) * ratio, (py[n] - 8) * ratio);
  }

  // A box, {at, half}, is dragged; a click or a key makes one of fixed size.
  function brush(svg, x, y) {
    const sizes = [x, y].map((scale) => SHARE * (scale.domain()[1] - scale.domain()[0]));
    const boxOf = (...at) => ({ at, half: sizes });
    const inverted = ([px, py]) => [x.invert(px), y.invert(py)];
    let began = null; // where the pointer went down
    const ends = [[x.range()[0], y.range()[1]], [x.range()[1], y.range()[0]]];
    const d3Brush = d3
      .brush()
      .extent(ends)
      .on("start brush end", ({ type, sourceEvent, selection }) => {
        if (!sourceEvent) return;
        const [px, py] = d3.pointer(sourceEvent.changedTouches?.[0] ?? sourceEvent, svg.node()); // a finger's, or a mouse's
        if (type === "start") return (began = [px, py]);
        const isClick = type === "end" && Math.hypot(px - began[0], py - began[1]) < STILL;
        if (isClick || !selection) {
          const hit = view.order.findLast((n) => Math.hypot(view.px[n] - px, view.py[n] - py) < NEAR);
          const picked = hit === undefined ? {} : { picked: nameOf(settings[setting[hit]]) };
          return change({ box: boxOf(...inverted([px, py])), ...picked });
        }
        const [one, other] = selection.map(inverted);
        const at = one.map((each, k) => (each + other[k]) / 2);
        const half = one.map((each, k) => Math.abs(each - other[k]) / 2);
        change({ box: { at, half } });
      });
    const words = "A box in the plane: arrow keys move it, plus and minus change its size, Escape removes it";
    const area = group(svg, "brush")
      .call(d3Brush)
      .attr("tabindex", 0)
      .attr("role", "application")
      .attr("aria-label", words);
    area.on("keydown", (event) => {
      const [way, growth] = [ARROWS[event.key], GROWTHS[event.key]];
      if (!way && !growth && event.key !== "Escape") return;
      event.preventDefault();
      if (event.key === "Escape") return change({ box: null });
      if (!state.box) return change({ box: boxOf(...scores.map((each) => d3.median(each))) });
      const { at, half } = state.box;
      const moved = at.map((each, k) => each + (way ? way[k] * sizes[k] : 0));
      const grown = half.map((each) => Math.min(100, each * (growth ?? 1)));
      change({ box: { at: inverted([x(moved[0]), y(moved[1])]), half: grown } }); // within the axes
    });
    return ([left, right, bottom, top]) =>
      area.call(d3Brush.move, state.box && [[left, top], [right, bottom]]);
  }

  function legend(dots, classes) {
    const only = (value) => change({ [state.colour]: state[state.colour] === value ? ALL : value });
    const named = values.get(state.colour).slice(0, CLASSES).map(([value], n) => {
      const pressed = String(state[state.colour] === value);
      const look = { type: "button", "aria-pressed": pressed, onclick: () => only(value) };
      return element("button", look, dots[n + 1], value);
    });
    const rest = [[OTHERS, "others"], [OWN, "your own runs"]].filter(([n]) => classes.includes(n));
    const focused = [...place.legend.children].indexOf(document.activeElement);
    place.legend.replaceChildren(...named, ...rest.map(([n, words]) => element("span", {}, dots[n], words)));
    place.legend.children[focused]?.focus();
    roving(place.legend, "button");
  }

  function update() {
    const { order, px, py, x, y } = view;
    const { at, half } = state.box ?? {};
    const edges = at && [x(at[0] - half[0]), x(at[0] + half[0]), y(at[1] - half[1]), y(at[1] + half[1])];
    const [left, right, bottom, top] = edges ?? [0, Infinity, Infinity, 0];
    const inside = order.filter((n) => px[n] >= left && px[n] <= right && py[n] >= top && py[n] <= bottom);
    const context = canvas.getContext("2d");
    context.clearRect(0, 0, canvas.width, canvas.height);
    context.globalAlpha = at ? FADED : 1;
    context.drawImage(all, 0, 0);
    context.globalAlpha = 1;
    if (at) paint(canvas, inside);
    view.move(edges ?? []);
    drawForm([...filters, { key: "colour", label: "Colour by", options: Object.entries(fields) }], state);
    const counts = frequencies(inside, (n) => setting[n]);
    const range = (k) => `${points(at[k] - half[k])} to ${points(at[k] + half[k])}`;
    const where = at
      ? `In the box, A_KA ${range(0)} and A_ZS ${range(1)}`
      : "Drag a box, click, or press an arrow key in the plane. Shown";
    say(place.said, `${where}: ${inside.length} runs of ${counts.length} settings${at ? "" : "; a dot on the edge lies beyond it"}.`);
    list(counts);
    about();
  }

  const reading = ({ claims = [], fronts = [] }) =>
    [
      ...claims.map((claim) => `${claim}: ${verdicts[claim].reading}`),
      ...fronts.map((front) => `a point of the front “${front}”`),
    ].join("; ") || "–";

  function list(found) {
    if (String(found) === listed) return; // so that a button keeps the focus
    listed = String(found);
    const rows = found.slice(0, ROWS).map(([n, inside]) => {
      const { count, means } = totals.get(n);
      const pick = button(settings[n].name, () => change({ picked: nameOf(settings[n]) }), { value: n });
      return [pick, settings[n].study, `${inside} of ${count}`, ...means.map(points), reading(settings[n])];
    });
    const more =
      found.length > ROWS
        ? `${found.length - ROWS} more settings are not listed; a smaller box or a filter lists them.`
        : "";
    place.list.replaceChildren(
      table(["setting", "study", "runs", "A_KA, mean", "A_ZS, mean", "its claims and their verdicts"], rows),
      element("p", { class: "how" }, more),
    );
    roving(place.list, "button");
  }

  function about() {
    const at = settings.findIndex((each) => nameOf(each) === state.picked);
    const chosen = settings[at];
    for (const each of place.list.querySelectorAll("button"))
      each.setAttribute("aria-pressed", String(Number(each.value) === at));
    place.away.hidden = place.about.hidden = !chosen;
    if (!chosen) return;
    const { count } = totals.get(at);
    const words = ` (${chosen.study}): the command computes ${count > 1 ? `the first of its ${count} runs` : "its run"}.`;
    const sentences = (chosen.claims ?? []).map((claim) =>
      element("li", {}, `${verdicts[claim].claimed} ${verdicts[claim].sentence}`),
    );
    place.about.replaceChildren(
      element("p", {}, element("b", {}, chosen.name), words),
      element("ul", {}, ...sentences),
      lostPictures(chosen),
    );
    take();
  }

  // Which of the first screen's pictures a setting names wrong in the end. They are stored for a few settings;
  // for others of our small network, a kernel can train one run and look.
  const SIDE = 48;
  const answers = new Map();
  kernel?.whenever(() => [...answers.values()].some((each) => each.asked));
  kernel?.listen(({ kind, id, answer, refused }) => {
    if (kind === "answer" && answers.has(id)) answers.set(id, { names: answer, refused });
    if (kind === "answer") draw(true);
  });
  function lostPictures({ names: stored, changes }) {
    const key = canonical(changes);
    const { names = stored, refused, asked } = answers.get(key) ?? {};
    if (refused) return element("p", {}, `Its pictures cannot be shown: ${refused}.`);
    if (asked) {
      const words = "It is trained once, to see which pictures it loses: a minute or two …";
      return element("p", {}, kernel.isSilent() ? `${SILENT}: queued` : words);
    }
    if (!names) {
      const ask = () => {
        answers.set(key, { asked: true });
        kernel.send({ verb: "ask", id: key, request: { changes } });
        draw(true);
      };
      return kernel ? button("Train it once: which pictures does it lose?", ask) : element("p", { class: "how" }, "Which pictures it loses is stored for the settings of the first page, and found in JupyterLab for all others.");
    }
    const { images, sprite } = data.pictures;
    const lost = images.map(({ truth }, n) => ({ truth, n, name: names[n] })).filter(({ truth, name }) => name !== truth);
    const rows = lost.map(({ truth, n, name }) => {
      return element("li", { class: "wrong" }, picture(sprite, n, SIDE, truth), element("p", {}, `✗ ${name}`));
    });
    const end = lost.length ? `${lost.length} in the end:` : "none in the end.";
    const said = `Of the ${images.length} pictures of the first page, a run of it loses ${end}`;
    return element("div", { class: "lost" }, element("p", {}, said), element("ul", {}, ...rows));
  }

  place.atlas.append(canvas);
  el.append(...Object.values(place));
  const take = takeAway(place.away, ["command", "YAML", "Python", "link"], () => {
    const { changes } = settings.find((each) => nameOf(each) === state.picked) ?? {};
    const link = kernel ? `atlas.atlas_explorer(${keywords(differing(bench.model.state, defaults))})` : bench.address();
    return changes && { profile: "cpu", profiles: data.profiles, changes, link };
  });
  const drawForm = form(place.controls, change, bench.warn);
  bench.begin();
}

// What explorers share: fields, the plane of A_KA and A_ZS, runs, pins, and what a reader takes away.
import d3 from "./d3.js";

export { d3 };

export const PALETTE = ["#0173b2", "#de8f05", "#029e73", "#cc78bc"];
const MOST_PINS = PALETTE.length;
export const PATIENCE = 500; // milliseconds after which a kernel that does not answer is busy

export function element(tag, attributes = {}, ...inner) {
  const made = document.createElement(tag);
  for (const [key, value] of Object.entries(attributes)) {
    if (key.startsWith("on")) made.addEventListener(key.slice(2), value);
    else if (value !== false && value != null) made.setAttribute(key, value === true ? "" : value);
  }
  const plain = ["option", "pre", "code"].includes(tag);
  made.append(...inner.filter((each) => each != null).flatMap((each) => (plain ? each : worded(each))));
  return made;
}

export const button = (words, onclick, more = {}) =>
  element("button", { type: "button", ...more, onclick }, words);

// The places of an explorer by name; what is said and warned of is read aloud.
export function places(el, names) {
  const place = Object.fromEntries(names.map((name) => [name, element("div", { class: name })]));
  place.said.setAttribute("aria-live", "polite");
  place.warned?.setAttribute("role", "status");
  el.classList.add("explorer");
  return place;
}

// A function that calls `update` in the next frame, once for all its calls until then.
export function perFrame(update) {
  let waiting = 0;
  return () => {
    waiting ||= requestAnimationFrame(() => {
      waiting = 0;
      update();
    });
  };
}

// The index of A_KA and A_ZS is set low: in a text, where it is copied with its "_", and in a drawing.
const INDEX = /_(KA|ZS)\b/;
const low = (part) => [element("span", { class: "hidden" }, "_"), element("sub", {}, part)];
const worded = (text) =>
  text.nodeType ? [text] : String(text).split(INDEX).flatMap((part, n) => (n % 2 ? low(part) : part));
export const say = (place, text) => place.replaceChildren(...worded(text));
export function write(texts, wordsOf) {
  join(texts, "tspan", (d) => wordsOf(d).split(INDEX))
    .attr("dy", (_, n) => n && (n % 2 ? 3 : -3))
    .attr("font-size", (_, n) => (n % 2 ? 9 : null))
    .text((part) => part);
}

export const short = (value, digits = 3) => String(Number(Number(value).toPrecision(digits)));
export const points = (value) => value.toFixed(1).replace("-", "−");
export const signed = (value) => (value > 0 ? "+" : "") + points(value);
const mean = (values) => d3.mean(values) ?? Number.NaN;
// A setting's score with half its interval, where there is one.
export const score = ({ at, half }, axis) => points(at[axis]) + (half ? ` ± ${points(half[axis])}` : "");

// The children of a kind that a part of a drawing has, one for each row of data.
export const join = (parent, tag, data) => parent.selectAll(tag).data(data).join(tag);

// The one part of a drawing that is called so.
export const group = (parent, name) =>
  parent.selectAll(`g.${name}`).data([0]).join("g").attr("class", name);

// What is drawn is named where a pointer rests on it.
export const hovered = (parts) => join(parts, "title", (d) => [d]).text((d) => d.label);

// A handle as a slider for the keyboard and for who listens.
export const slider = (handles, label, now, words) =>
  handles
    .attr("role", "slider")
    .attr("aria-label", label)
    .attr("aria-valuenow", now)
    .attr("aria-valuetext", words);

// A drawing that fills the width of its place, at most `most` wide.
export function drawing(place, height, label, most = 720) {
  const width = Math.max(300, Math.min(most, place.clientWidth || most));
  return join(d3.select(place), "svg", [0])
    .attr("viewBox", `0 0 ${width} ${height}`)
    .attr("width", width)
    .attr("height", height)
    .attr("role", "group")
    .attr("aria-label", label)
    .property("extent", [width, height]);
}

export function axes(svg, x, y, [xLabel, yLabel], ticks = 6, named = null) {
  const [left, right] = x.range();
  const [bottom, top] = y.range();
  const both = group(svg, "axes").lower();
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

// Lets an element be dragged by a pointer and moved by arrow keys: `move` gets the pointer's place in
// the drawing, `nudge` the two directions of a key.
export const ARROWS = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, 1], ArrowDown: [0, -1] };
export function draggable(handle, move, nudge) {
  const drag = d3.drag().container(function () {
    return this.ownerSVGElement;
  });
  handle.attr("tabindex", 0).classed("handle", true);
  handle.call(drag.on("drag", (event, d) => move(event.x, event.y, d)));
  handle.on("keydown", (event, d) => {
    const way = ARROWS[event.key];
    if (!way) return;
    event.preventDefault();
    event.stopPropagation();
    nudge(...way, d);
  });
}

// A column of numbers stands at the right.
const NUMBER = /^([+−]?[\d,.]+( ± [\d.]+)?|–|…)$/;
export function table(head, rows) {
  const numeric = head.map((_, k) => rows.every((cells) => NUMBER.test(cells[k])));
  const row = (cells, tag) =>
    element("tr", {}, ...cells.map((cell, k) => element(tag, { class: numeric[k] && "figure" }, cell)));
  const body = element("tbody", {}, ...rows.map((cells) => row(cells, "td")));
  return element("div", { class: "wide", tabindex: 0 }, element("table", {}, element("thead", {}, row(head, "th")), body));
}

// Fields of a form. Each is {key, label, options} or {key, label, range: [low, high], step, log, percent,
// unit}, and `long` where it takes two places of the grid; what does not matter for a state is left out by the explorer.
export function form(place, change, warn) {
  let drawn = "";
  const shown = new Map();

  function choice({ key, label, options }) {
    const select = element("select", { oninput: () => change({ [key]: JSON.parse(select.value) }) });
    for (const each of options) {
      const [value, words] = Array.isArray(each) ? each : [each, each];
      select.append(element("option", { value: JSON.stringify(value) }, String(words)));
    }
    shown.set(key, (value) => (select.value = JSON.stringify(value)));
    return element("label", {}, element("span", {}, label), select);
  }

  function check({ key, label }) {
    const box = element("input", { type: "checkbox", oninput: () => change({ [key]: box.checked }) });
    shown.set(key, (value) => (box.checked = value));
    return element("label", { class: "check" }, box, element("span", {}, label));
  }

  // With `percent`, a share is shown and typed as per cent: 30, or 30%, is 0.3.
  function number({ key, label, range: [low, high], step, log, percent, unit = () => "" }) {
    const format = (value) => (percent ? `${short(100 * value)}%` : short(value));
    let current = low;
    const [to, from] = log ? [Math.log10, (x) => Number((10 ** x).toPrecision(3))] : [Number, Number];
    const slider = element("input", { type: "range", min: to(low), max: to(high), step: step ?? 0.01 });
    const typed = element("input", {
      type: "text",
      inputmode: "decimal",
      "aria-label": `${label}, as a number`,
    });
    slider.setAttribute("aria-label", label);
    slider.addEventListener("input", () => change({ [key]: from(Number(slider.value)) }));
    typed.addEventListener("keydown", (event) => event.key === "Enter" && (event.preventDefault(), commit()));
    typed.addEventListener("change", commit);
    function commit() {
      if (typed.value === format(current)) return; // as after Enter, when the field is left
      const words = typed.value.replace(percent ? /[%\s]/g : /\s/g, "");
      const asked = Number(words) / (percent ? 100 : 1);
      const known = words !== "" && Number.isFinite(asked);
      const value = known ? Math.min(high, Math.max(low, asked)) : current;
      change({ [key]: log ? value : Math.round(value / step) * step });
      const became = `${typed.value || "nothing"} became ${format(value)}`;
      if (!known || value !== asked)
        warn(`${label}: ${became}; it goes from ${format(low)} to ${format(high)}.`);
      typed.value = format(value);
    }
    const after = element("span");
    shown.set(key, (value) => {
      current = value;
      slider.value = to(value);
      after.textContent = unit(value);
      slider.setAttribute("aria-valuetext", `${format(value)} ${unit(value)}`.trim());
      if (document.activeElement !== typed) typed.value = format(value);
    });
    return element("div", { class: "number" }, element("span", {}, label), slider, typed, after);
  }

  return (fields, state) => {
    const signature = JSON.stringify(fields);
    if (signature !== drawn) {
      const focused = place.querySelector(":focus")?.closest("[data-key]")?.dataset.key;
      shown.clear();
      place.replaceChildren(
        ...fields.map((field) => {
          const made = field.options ? choice(field) : field.range ? number(field) : check(field);
          made.dataset.key = field.key;
          made.classList.toggle("long", Boolean(field.long));
          return made;
        }),
      );
      drawn = signature;
      if (focused) place.querySelector(`[data-key="${focused}"] :is(input, select)`)?.focus();
    }
    for (const { key } of fields) shown.get(key)(state[key]);
  };
}

// The plane of A_KA and A_ZS. `stored` are settings {label, at, half}, `dots` single runs [A_KA, A_ZS],
// `front` a line of places; of the layers that move, `predicted` is {at, half} and `own` are runs
// {at, trail, colour, label}; `key` says what the layers are.
const KEY = {
  stored: "stored setting",
  dots: "single run",
  front: "plain fine-tuning’s front",
  pinned: "chosen or pinned",
  predicted: "predicted",
  own: "your run",
};
export function plane(place, { preview, choose, key = {} }) {
  const label = "Where runs end: new knowledge, A_KA, to the right; what was kept, A_ZS, upwards";
  return ({ stored = [], dots = [], front = [], predicted, own = [], pinned = [] }) => {
    const svg = drawing(place, 330, label);
    const [width, height] = svg.property("extent");
    const places = [...stored.map((d) => d.at), ...dots, ...front, ...own.flatMap((d) => d.trail)];
    const span = (k) => {
      const [low = 30, high = 60] = d3.extent(places, (d) => d[k]);
      return [low - 1.5, high + 1.5];
    };
    const x = d3.scaleLinear(span(0), [44, width - 10]);
    const y = d3.scaleLinear(span(1), [height - 44, 26]);
    axes(svg, x, y, ["A_KA (%), what is new", "A_ZS (%), what was known"]);
    const at = (d) => `translate(${x(d[0])},${y(d[1])})`;
    const line = d3.line((d) => x(d[0]), (d) => y(d[1]));
    join(group(svg, "front"), "path", [front]).attr("d", line);
    join(group(svg, "dots"), "circle", dots).attr("r", 2.5).attr("transform", at);
    const [inX, inY] = [x.copy().clamp(true), y.copy().clamp(true)]; // no interval leaves the plane
    const bars = (layer, data) =>
      join(layer, "path", data).attr("d", ({ at: [a, b], half }) => {
        const [wide, high] = half ?? [0, 0];
        const across = `M${inX(a - wide)},${y(b)}H${inX(a + wide)}`;
        return `${across}M${x(a)},${inY(b - high)}V${inY(b + high)}`;
      });
    const layer = group(svg, "stored");
    bars(layer, stored);
    join(layer, "circle", stored)
      .attr("r", 4.5)
      .attr("tabindex", 0)
      .attr("role", "button")
      .attr("aria-label", (d) => `${d.label}: A_KA ${points(d.at[0])}, A_ZS ${points(d.at[1])}`)
      .attr("transform", (d) => at(d.at))
      .on("mouseenter focus", (_, d) => preview(d))
      .on("mouseleave blur", () => preview(null))
      .on("click", (_, d) => choose(d))
      .on("keydown", (event, d) => ["Enter", " "].includes(event.key) && (event.preventDefault(), choose(d)))
      .call(hovered);
    join(group(svg, "pinned"), "circle", pinned)
      .attr("r", 8)
      .attr("transform", (d) => at(d.at))
      .attr("stroke", (d) => d.colour);
    const guesses = predicted ? [predicted] : [];
    const guess = group(svg, "predicted").attr("opacity", predicted?.weight ?? 1);
    bars(guess, guesses);
    join(guess, "circle", guesses)
      .attr("r", 6.5)
      .attr("transform", (d) => at(d.at));
    const runs = join(group(svg, "own"), "g", own).attr("stroke", (d) => d.colour);
    join(runs, "path", (d) => [d.trail]).attr("d", line);
    join(runs, "circle", (d) => d.trail.map((each, k) => ({ at: each, last: k === d.trail.length - 1, d })))
      .attr("r", (d) => (d.last ? 6 : 2))
      .attr("fill", (d) => d.d.colour)
      .attr("transform", (d) => at(d.at));
    const layers = { stored, dots, front, pinned, predicted: guesses, own };
    const named = Object.entries({ ...KEY, ...key }).filter(([name]) => layers[name].length);
    place.querySelector(".key")?.remove();
    place.append(
      element("p", { class: "key" }, ...named.map(([name, words]) => element("span", { class: `of-${name}` }, words))),
    );
  };
}

// One setting minus another, paired by replicate: the stored differences, and those of one's own runs.
// Streams of one base are averaged before an interval is made, and none is made before all are stored.
function comparison(place, one, other, { bases, factors }) {
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
    const half = (factors[of.length] * d3.deviation(of)) / Math.sqrt(of.length);
    const interval =
      stored.length < planned ? "" : ` (${points(mean(of) - half)} to ${points(mean(of) + half)})`;
    const known = of.length > 1 ? [signed(mean(of)) + interval] : [];
    return `${name} ${[...known, ...(own ? [`your two runs ${signed(own[k])}`] : [])].join(", ")}`;
  });
  const count = stored.length < planned ? `${stored.length} of ${planned}` : `${stored.length}`;
  const means = stored.length ? `; means of ${count} stored pairs, with intervals over bases` : "";
  const words = `${one.label} minus ${other.label}, in points${means}: ${sentences.join("; ")}.`;
  const strip = element("div", { class: "strip" });
  place.replaceChildren(element("p", { class: "difference" }, words), strip);
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

// Changes by dotted key as [section, rows of [section, key, value]].
const sections = (changes) =>
  d3.groups(
    Object.entries(changes).map(([key, value]) => [...key.split("."), value]),
    ([section]) => section,
  );

// The ways in which a setting leaves the page.
export const FORMS = {
  command: ({ profile, changes }) =>
    [
      "cmpt run " + profile,
      ...Object.entries(changes).map(([key, value]) => `${key}=${JSON.stringify(value).replaceAll('"', "")}`),
    ].join(" \\\n    "),
  YAML: ({ profile, changes }) =>
    `profile: ${profile}\n` +
    sections(changes)
      .flatMap(([section, rows]) => [
        `${section}:\n`,
        ...rows.map(([, key, value]) => `  ${key}: ${JSON.stringify(value)}\n`),
      ])
      .join(""),
  Python: ({ profile, changes }) =>
    [
      `cmp.run("${profile}"`,
      ...sections(changes).map(([section, rows]) => {
        const values = rows.map(([, key, value]) => `"${key}": ${python(value)}`);
        return `${section}={${values.join(", ")}}`;
      }),
    ].join(",\n        ") + ")",
  papermill: ({ chapter, parameters }) =>
    `cmpt book --chapter ${chapter}` +
    Object.entries(parameters)
      .map(([key, value]) => ` -P ${key}=${value}`)
      .join(""),
  link: ({ link }) => link,
};
export const keywords = (state) =>
  Object.entries(state)
    .map(([key, value]) => `${key}=${python(value)}`)
    .join(", ");
const python = (value) =>
  value === true ? "True" : value === false ? "False" : value === null ? "None" : JSON.stringify(value);

export function takeAway(place, forms = FORMS) {
  const kind = element(
    "select",
    { "aria-label": "Copy as" },
    ...Object.keys(forms).map((each) => element("option", { value: each }, each)),
  );
  const text = element("pre", { tabindex: 0 });
  const copy = button("Copy", async () => {
    await navigator.clipboard.writeText(text.textContent);
    copy.textContent = "Copied";
    setTimeout(() => (copy.textContent = "Copy"), 1500);
  });
  let given = null;
  const show = () => (text.textContent = given ? forms[kind.value](given) : "");
  kind.addEventListener("input", show);
  place.append(element("div", { class: "tools" }, element("span", {}, "Take it away as"), kind, copy), text);
  return (next) => {
    given = next;
    show();
  };
}

// Runs that the kernel trains in processes of their own. A message that stays without an answer says
// that the kernel is busy; it can be withdrawn until the kernel hears of it.
function runner(kernel, changed) {
  const runs = new Map();
  const send = (message) => {
    try {
      kernel.send(message);
    } catch {
      // the kernel is gone, as its silence will say
    }
  };
  kernel?.listen((message) => {
    const run = runs.get(message.id);
    if (!run || run.over) return; // one that was cancelled stays so
    if (message.kind === "run") Object.assign(run, message.about, { heard: true });
    changed();
  });
  return {
    all: () => [...runs.values()],
    start(about) {
      const id = `${Date.now().toString(36)}-${runs.size}`;
      const run = { ...about, id, trail: [], state: "asked", progress: 0, heard: false };
      runs.set(id, run);
      send({ verb: "run", id, profile: run.profile, changes: run.changes });
      setTimeout(() => {
        if (!run.heard) Object.assign(run, { state: "kernel busy or gone: queued" });
        changed();
      }, PATIENCE);
      changed();
    },
    stop(run) {
      send({ verb: "stop", id: run.id });
      if (!run.heard) Object.assign(run, { state: "cancelled", over: true });
      changed();
    },
    forget(run) {
      runs.delete(run.id);
      changed();
    },
  };
}

// A run's row stays the same element: a click on what is replaced while the button is down is lost.
function runRow(run, runs, colour) {
  const words = `${run.label} (${run.profile}): ${run.state}`;
  run.row ??= element(
    "div",
    { class: "run" },
    element("span", { class: "swatch" }),
    element("span"),
    element("progress", { max: 1 }),
    button("", () => (run.over ? runs.forget(run) : runs.stop(run))),
  );
  const [swatch, said, bar, stop] = run.row.children;
  swatch.style.background = colour;
  if (said.textContent !== words) said.textContent = words;
  bar.value = run.progress;
  bar.setAttribute("aria-label", words);
  const verb = run.over ? "Remove" : run.heard ? "Stop" : "Cancel";
  if (stop.textContent !== verb) stop.textContent = verb;
  return run.row;
}

// The frame of an explorer. The explorer gives `fields(state)`, `picture(place, state, change)` and
// `describe(state)` -> {label, sentence, changes, parameters, predicted}; `settle(state, changes)`
// makes a state possible.
export function workbench(
  el,
  { table: data, kernel, start, name, fields, picture, describe, settle, hint, actions = [] },
) {
  const names = ["presets", "controls", "said", "warned", "runs", "pins", "away", "picture", "plane"];
  const place = places(el, names);
  const drawn = element("div", {}, place.picture, element("p", { class: "key" }, hint));
  const sides = element("div", { class: "sides" }, drawn, place.plane);
  const { presets, controls, said, warned, pins: pinned, away } = place;
  el.append(presets, controls, sides, said, warned, place.runs, pinned, away);
  let state = settle({ ...data.defaults, ...start, ...linked(name) }, {});
  let seen = null; // a stored setting that the pointer is over
  const pins = [];
  const refresh = perFrame(update);
  const storedOf = (changes) => data.runs.find((run) => same(run.changes, changes));
  const draw = { form: form(place.controls, change, warn), away: takeAway(place.away) };
  draw.plane = plane(place.plane, { preview, choose: (run) => change(run.state) });
  const runs = runner(kernel, refresh);

  function warn(words) {
    place.warned.textContent = words;
  }
  function change(changes) {
    warn("");
    seen = null;
    state = settle({ ...state, ...changes }, changes);
    refresh();
  }
  function preview(run) {
    if (seen === run) return;
    seen = run;
    refresh();
  }
  const shownState = () => (seen ? settle({ ...state, ...seen.state }, {}) : state);

  function pin(shown) {
    const about = describe(shown);
    if (pins.length < MOST_PINS && !pins.some((each) => each.label === about.label))
      pins.push({ ...about, state: shown });
    refresh();
  }
  const colour = (label) => PALETTE[Math.max(0, pins.findIndex((each) => each.label === label))];
  const profile = () => place.runs.querySelector("select")?.value ?? "cpu";

  function launch(all) {
    for (const { label, changes } of all) runs.start({ label, changes, profile: profile() });
  }

  const sizes = element(
    "select",
    { "aria-label": "Size of a run", oninput: refresh },
    ...Object.entries(data.sizes).map(([key, words]) => element("option", { value: key }, words)),
  );
  const buttons = element(
    "div",
    { class: "tools" },
    kernel && sizes,
    kernel && button("Run this", () => launch([describe(state)]), { class: "go" }),
    kernel && button("Run the first two pins", () => launch(pins.slice(0, 2)), { class: "both" }),
    button("Pin to compare", () => pin(state)),
  );
  const list = element("div", { class: "list" });
  place.runs.append(buttons, list);
  place.presets.append(
    element("span", {}, "Begin from"),
    ...data.presets.map(({ label, state: to }) => button(label, () => change(to))),
  );
  buttons.append(...actions.map(({ label, to }) => button(label, () => compare(to), { class: "act" })));
  function compare(to) {
    pin(state);
    change(to(state));
    pin(state);
  }

  function drawPins() {
    const own = (label) =>
      runs
        .all()
        .filter((run) => run.label === label && run.done && run.profile === profile())
        .at(-1)
        ?.trail.at(-1);
    const rows = pins.map((each, k) => {
      const stored = storedOf(each.changes);
      const known = stored ?? each.predicted;
      const scored = (axis) => (known ? score(known, axis) : "–");
      const mine = own(each.label);
      const drop = button("Unpin", () => (pins.splice(k, 1), refresh()));
      const look = { class: "name", style: `border-color:${PALETTE[k]}` };
      const show = button(each.label, () => change(each.state), look);
      return [
        show,
        scored(0),
        scored(1),
        stored ? "stored" : known ? "predicted" : "nothing near",
        mine ? mine.map(points).join(", ") : "–",
        drop,
      ];
    });
    const between = element("div");
    place.pins.replaceChildren(
      ...(rows.length
        ? [table(["pinned", "A_KA", "A_ZS", "from", `your run (${profile()})`, ""], rows), between]
        : []),
    );
    if (pins.length > 1) {
      const [one, other] = pins.map((each) => ({
        ...(profile() === "cpu" ? storedOf(each.changes) : {}),
        label: each.label,
        own: own(each.label),
      }));
      comparison(between, one, other, data);
      const words = "Runs of `quick` are too small to test a difference like this: choose `cpu` for it.";
      if (profile() === "quick") between.append(element("p", { class: "how" }, words));
    }
  }

  function update() {
    const shown = shownState();
    const about = describe(shown);
    const stored = seen ?? storedOf(about.changes);
    draw.form(fields(shown), shown);
    picture(
      place.picture,
      shown,
      change,
      pins.map((each, k) => ({ ...each, colour: PALETTE[k] })),
    );
    const quick = kernel && profile() === "quick";
    const own = runs.all().filter((run) => run.profile === profile() && run.trail.length);
    draw.plane({
      stored: quick ? [] : data.runs,
      dots: quick ? data.band : [],
      front: quick ? [] : data.front,
      predicted: quick || stored ? null : about.predicted,
      own: own.map((run) => ({ ...run, colour: colour(run.label) })),
      pinned: quick
        ? []
        : [
            ...pins.map((each, k) => ({
              at: (storedOf(each.changes) ?? each.predicted)?.at,
              colour: PALETTE[k],
            })),
            stored && { at: stored.at, colour: "currentColor" },
          ].filter((each) => each?.at),
    });
    const ends = stored
      ? ` Stored, ${Object.keys(stored.ends).length} runs: A_KA ${score(stored, 0)}, A_ZS ${score(stored, 1)}.`
      : about.predicted
        ? ` Predicted: A_KA ${points(about.predicted.at[0])}, A_ZS ${points(about.predicted.at[1])}. ${about.predicted.words}`
        : " No prediction: no stored run is near.";
    say(place.said, about.sentence + ends);
    buttons.querySelector(".both")?.toggleAttribute("disabled", pins.length < 2);
    const rows = runs.all().map((run) => runRow(run, runs, colour(run.label)));
    if (rows.length !== list.children.length || rows.some((row, n) => row !== list.children[n]))
      list.replaceChildren(...rows);
    drawPins();
    draw.away({
      profile: "cpu",
      ...about,
      chapter: data.chapter,
      link: kernel ? `explorers.${name}_explorer(${keywords(state)})` : linkTo(name, state),
    });
  }

  new ResizeObserver(refresh).observe(el);
  update();
  el.dataset.ready = "";
}

const same = (one, other) => {
  const keys = new Set([...Object.keys(one), ...Object.keys(other)]);
  return [...keys].every((key) => JSON.stringify(one[key]) === JSON.stringify(other[key]));
};

// The state of an explorer in an address.
export function linkTo(name, state) {
  return `${location.href.split("#")[0]}#${new URLSearchParams({ explorer: name, state: JSON.stringify(state) })}`;
}

export function linked(name) {
  try {
    const words = new URLSearchParams(location.hash.slice(1));
    return words.get("explorer") === name ? JSON.parse(words.get("state")) : {};
  } catch {
    return {};
  }
}

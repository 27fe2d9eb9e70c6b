// The learning rate over a stream: the curve of an update, the peaks of all, and where such runs end.
import { percent, short } from "./form.js";
import { axes, d3, drawing, group, handles, isHeld, join } from "./plane.js";
import { drawable, durations, peaks, rates } from "./schedules.js";
import { among, flag, listOf, within } from "./state.js";
import { workbench } from "./workbench.js";

const WIDTH = 0.35; // of the neighbourhood in which stored schedules predict, see `distance`
const FAINT = 0.05; // weight of the nearest stored schedule below which nothing is predicted
const PARTS = 4;
const ROOM = 1.08; // of the axis of rates, over the highest
const FLAT = 0.05; // share of the axis below which a curve is a flat line
const KEYS = ["name", "meta", "peak", "warmup", "cooldown", "level", "decay", "shift", "peaks"];
const MOST_SAID = 3; // of peaks in a label
const SHIFTS = [0, 400]; // steps
const SHARES = ["warmup", "cooldown"];
const NEEDED = new Set([...SHARES, "shift", "level", "decay"]); // settings that not every curve has

// What a state can be, what it means, and what is predicted for it.
export function model(table) {
  const { curves, metas, tasks: T, steps: N } = table;
  const names = Object.keys(curves).filter((name) => drawable(name, "none")); // not a reader's own
  const scheduleOf = (state) => Object.fromEntries(KEYS.map((key) => [key, state[key]]));
  const settingsOf = ({ name, meta }) => [...curves[name].settings, ...metas[meta].settings];
  const ratesOf = (state) => rates(scheduleOf(state), T, N, curves);
  const metasOf = (name) =>
    Object.keys(metas).filter(
      (meta) =>
        drawable(name, meta) &&
        (metas[meta].curve ?? name) === name &&
        !(curves[name].overStream && meta !== "none"),
    );

  // Only what goes together: a curve takes its own meta schedules, warmup and cooldown fit an update.
  // With the lock, the peak moves so that the mean rate stays.
  function settle(state, changes) {
    const next = { ...state };
    if (!metasOf(next.name).includes(next.meta)) next.meta = "none";
    for (const key of ["warmup", "cooldown"]) next[key] = Math.min(1, Math.max(0, next[key]));
    const room = (1 - ("warmup" in changes ? next.warmup : next.cooldown)).toFixed(3);
    if (next.warmup + next.cooldown > 1) next["warmup" in changes ? "cooldown" : "warmup"] = Number(room);
    // 1 - 33 / 40 is 0.17500000000000004
    for (const key of ["warmup", "cooldown"]) next[key] = Number(next[key].toFixed(6));
    if (curves[next.name].overStream) {
      // a step is left from which the next update starts
      next.warmup = Math.min(next.warmup, 1 - 1 / N);
      next.cooldown = Math.max(0, Math.min(next.cooldown, Number((1 - 1 / N - next.warmup).toFixed(6))));
    }
    if (next.meta === "free" && next.peaks.length !== T) next.peaks = peaks(scheduleOf(next), T, N, curves);
    const isZero = d3.mean(ratesOf(next)) === 0; // no peak gives it another mean
    if (next.lock && !isZero && (changes.lock || Number.isFinite(next.mean))) {
      const wanted = changes.lock ? d3.mean(ratesOf(next)) : next.mean;
      next.peak = (next.peak * wanted) / d3.mean(ratesOf(next));
    }
    next.peak = Number(
      Math.min(table.ranges.peak[1], Math.max(table.ranges.peak[0], next.peak)).toPrecision(3),
    );
    if (!next.lock || changes.lock || !Number.isFinite(next.mean)) next.mean = d3.mean(ratesOf(next));
    return next;
  }

  // Warmup and cooldown take from each other.
  function note(before, after, changes) {
    const [moved, other] = "warmup" in changes ? SHARES : "cooldown" in changes ? [...SHARES].reverse() : [];
    if (!moved || !settingsOf(after).includes(other)) return "";
    if (after[moved] < changes[moved] - 1e-6)
      return `The ${moved} became ${percent(after[moved])}: a step is left from which the next update starts.`;
    if (after[other] === before[other]) return "";
    return `There is no room for more ${moved} beside the ${other}, which became ${percent(after[other])}.`;
  }

  function fields(state) {
    const uses = new Set(settingsOf(state));
    const share = { range: [0, 1], step: 0.025, percent: true };
    return [
      {
        key: "name",
        label: "Curve of an update",
        options: names,
      },
      { key: "meta", label: "Meta schedule", options: metasOf(state.name) },
      { key: "peak", label: "Peak", range: table.ranges.peak, log: true, step: 0.01, off: state.lock },
      { key: "warmup", label: "Warmup", ...share },
      { key: "cooldown", label: "Cooldown", ...share },
      { key: "shift", label: "Shift of rsqrt, in steps", range: SHIFTS, step: 1 },
      { key: "level", label: "Level (multiple of the peak)", range: [0, 1], step: 0.01 },
      { key: "decay", label: "Decay per update", range: [0, 1], step: 0.01 },
      { key: "lock", label: "Keep the mean rate (the peak follows)" },
    ].map((field) => ({ off: NEEDED.has(field.key) && !uses.has(field.key), ...field }));
  }

  // What two schedules differ in: the sum of rates of each update, and how it is spread within it.
  function features(values) {
    return Array.from({ length: T }, (_, t) => {
      const own = values.subarray(t * N, (t + 1) * N);
      const sum = d3.sum(own) || 1e-9;
      const parts = Array.from(
        { length: PARTS },
        (_, k) => d3.sum(own.subarray((k * N) / PARTS, ((k + 1) * N) / PARTS)) / sum,
      );
      return [Math.log(sum), ...parts];
    }).flat();
  }
  const distance = (one, other) => Math.sqrt(d3.sum(one, (value, k) => (value - other[k]) ** 2) / T);

  function predict(own, known) {
    const weights = known.map((run) => Math.exp(-0.5 * (distance(own, run.features) / WIDTH) ** 2));
    const most = Math.max(...weights);
    if (!(most > FAINT)) return null;
    const total = d3.sum(weights);
    const at = [0, 1].map((k) => d3.sum(known, (run, n) => weights[n] * run.at[k]) / total);
    return { at, weight: Math.min(1, 0.35 + most), near: known[weights.indexOf(most)] };
  }

  const known = table.runs
    .map((run) => {
      run.state = { ...table.defaults, ...run.schedule, lock: false };
      return { ...run, features: features(ratesOf(run.state)) };
    });
  const errors = known
    .map((run) => [
      run,
      predict(
        run.features,
        known.filter((other) => other !== run),
      ),
    ])
    .filter(([, guess]) => guess)
    .map(([run, guess]) => [0, 1].map((k) => guess.at[k] - run.at[k]));
  const misses = [0, 1].map((k) => Math.sqrt(d3.mean(errors, (error) => error[k] ** 2) ?? Number.NaN));

  function describe(state) {
    const schedule = scheduleOf(state);
    const values = ratesOf(state);
    const uses = new Set(["name", "meta", "peak", ...settingsOf(state)]);
    const changes = Object.fromEntries(
      Object.entries(schedule)
        .filter(([key, value]) => uses.has(key) && JSON.stringify(value) !== JSON.stringify(table.usual[key]))
        .map(([key, value]) => [`schedule.${key}`, value]),
    );
    const idle = d3.range(T).find((t) => d3.every(values.subarray(t * N, (t + 1) * N), (rate) => rate === 0));
    const guess = idle === undefined ? predict(features(values), known) : null;
    const predicted = guess && {
      ...guess,
      half: misses,
      words: `This is a mean of stored schedules, in which near ones count most; the nearest is ${guess.near.label}. It cannot know what the peak of a single update does. After ±: by how much it misses stored schedules when they are left out.`,
    };
    const mean = d3.mean(values);
    return {
      label: labelOf(state, changes),
      sentence: `Mean rate ${short(mean)}, ${(mean / state.peak).toFixed(2)} of the peak; sum of all rates ${short(mean * T * N)}.`,
      changes,
      parameters: [["meta", state.meta], ["peak", state.peak], ["stream_seed", 0]],
      lacks: [
        ...(state.name === "rsqrt" ? [] : [`the curve ${state.name}`]),
        ...Object.keys(changes)
          .map((key) => key.split(".")[1])
          .filter((key) => !["name", "meta", "peak"].includes(key)),
      ],
      predicted,
      refused: idle !== undefined && `update ${idle + 1} would train at a learning rate of 0 and change nothing`,
    };
  }

  // Of own peaks those that are not 1, and of many the first and the mean of all.
  function peaksInWords(values) {
    const spans = [];
    values.forEach((value, t) => {
      if (t && value === values[t - 1]) spans.at(-1).to = t + 1;
      else spans.push({ value, from: t + 1, to: t + 1 });
    });
    const lower = spans.filter(({ value }) => value !== 1);
    const said = lower.slice(0, MOST_SAID).map(({ value, from, to }) => `${short(value)} in ${from === to ? from : `${from}–${to}`}`);
    const more = lower.length > MOST_SAID ? [`on average ${short(d3.mean(values))}`] : [];
    return `own peaks (${[...said, ...more].join(", ") || "all 1"})`;
  }

  // A label says the curve and its peak, and all else that is not as usual.
  function labelOf({ name, meta, peak, peaks }, changes) {
    const more = Object.entries(changes)
      .map(([key, value]) => [key.split(".")[1], value])
      .filter(([key]) => !["name", "meta", "peak", "peaks"].includes(key))
      .map(([key, value]) => `${key} ${SHARES.includes(key) ? percent(value) : short(value)}`);
    return [name, ...(meta === "none" ? [] : [meta === "free" ? peaksInWords(peaks) : `meta ${meta}`]), `peak ${short(peak)}`, ...more].join(", ");
  }

  const kinds = {
    name: among(names),
    meta: among(Object.keys(metas)),
    peak: within(table.ranges.peak),
    shift: (value) => Number.isInteger(value) && within(SHIFTS)(value),
    peaks: (value) => listOf(within([0, 1]))(value) && [0, T].includes(value.length),
    lock: flag,
    ...Object.fromEntries(["warmup", "cooldown", "level", "decay"].map((key) => [key, within([0, 1])])),
  };
  return { settle, fields, describe, note, kinds, misses, ratesOf, scheduleOf };
}

export function explore(el, { table, kernel, start }) {
  const { curves, metas, tasks: T, steps: N } = table;
  const about = model(table);
  const { ratesOf, scheduleOf } = about;
  let top = 0; // of the rates, by which the axis is drawn

  // Left the first update with its knees, right the whole stream with the peaks of its updates.
  function picture(place, state, change, pins, { anew, passes }) {
    const svg = drawing(place, 330, "The learning rate: of the first update, and over the stream", 640);
    const [width, height] = svg.property("extent");
    const own = ratesOf(state);
    // the axis stays until something leaves it, or is too low to be seen
    const highest = Math.max(d3.max(own), ...pins.map((pin) => d3.max(ratesOf(pin.state))));
    const stays = !anew && highest <= ROOM * top && (isHeld() || highest > FLAT * top);
    const most = stays ? top : highest;
    if (!passes) top = most;
    const split = 0.32 * width;
    const y = d3.scaleLinear([0, most * ROOM * 1e3], [height - 44, 26]);
    const first = d3.scaleLinear([0, N], [44, split]);
    const x = d3.scaleLinear([0, T], [split + 30, width - 8]);
    axes(group(svg, "one"), first, y, ["steps of update 1", "rate (10⁻³)"], Math.min(4, split / 40));
    axes(group(svg, "all"), x, y, ["updates", ""], Math.min(8, (width - split) / 40));
    const line = (scale, per) =>
      d3.line(
        (_, n) => scale((n + 0.5) / per),
        (rate) => y(1000 * rate),
      );
    const curvesShown = [
      ...pins.map((pin) => ({ values: ratesOf(pin.state), colour: pin.colour })),
      { values: own, colour: null },
    ];
    const paths = curvesShown.flatMap(({ values, colour }) => [
      { path: line(first, 1)(values.subarray(0, N)), colour },
      { path: line(x, N)(values), colour },
    ]);
    join(group(svg, "lines"), "path", paths)
      .attr("d", (d) => d.path)
      .attr("class", (d) => (d.colour ? "pin" : "now"))
      .style("stroke", (d) => d.colour);
    const [W, C] = durations(state, N, curves);
    const settings = curves[state.name].settings;
    const tops = peaks(scheduleOf(state), T, N, curves);
    const firstTop = d3.max(own.subarray(0, N));
    const knees = [
      !state.lock && { key: "peak", now: state.peak, label: `Peak ${short(state.peak)}`, x: first(Math.max(W, 0.5)), y: y(1000 * firstTop) },
      settings.includes("cooldown") && {
        key: "cooldown",
        now: C,
        label: `Cooldown ${C} steps`,
        x: first(N - C),
        y: y(1000 * own[Math.max(0, N - C - 1)]),
      },
      settings.includes("warmup") && { key: "warmup", now: W, label: `Warmup ${W} steps`, x: first(W), y: y(0) },
    ].filter((knee) => knee);
    const share = (at) => Math.min(1, Math.max(0, Math.round(first.invert(at)) / N));
    const moves = {
      peak: (_, py) => ({ peak: (state.peak * Math.max(y.invert(py), 1e-6)) / (1000 * (firstTop || state.peak)) }),
      warmup: (px) => ({ warmup: share(px) }),
      cooldown: (px) => ({ cooldown: 1 - share(px) }),
    };
    const nudges = {
      peak: (right, up) => ({ peak: state.peak * 10 ** (0.02 * (right + up)) }),
      warmup: (right, up) => ({ warmup: Math.max(0, state.warmup + (right + up) / N) }),
      cooldown: (right, up) => ({ cooldown: Math.max(0, state.cooldown - (right - up) / N) }),
    };
    const named = knees.map((d) => ({ ...d, name: d.label, words: d.label }));
    handles(group(svg, "knees"), named, 7, {
      move: (px, py, d) => change(moves[d.key](px, py)),
      nudge: (right, up, d) => change(nudges[d.key](right, up)),
    });
    // A dragged peak of one update makes the meta schedule free.
    const set = (t, value) => {
      const free = tops.map((each, k) => Number(Math.min(1, Math.max(0, k === t ? value : each)).toFixed(3)));
      change({ meta: "free", peaks: free });
    };
    const bars = tops.map((value, t) => ({
      key: `update-${t + 1}`,
      t,
      value,
      now: value,
      least: 0,
      most: 1,
      name: `Peak of update ${t + 1}`,
      words: `${short(value)} of the highest`,
      x: x(t + (W + 0.5) / N),
      y: y(1000 * state.peak * value),
    }));
    const every = Math.ceil(25 / (x(1) - x(0))); // as many handles as have room for a finger
    const isFixed = curves[state.name].overStream || !drawable(state.name, "free") || !metas.free;
    const dots = handles(group(svg, "peaks"), isFixed ? [] : bars.filter(({ t }) => t % every === 0), 5, {
      move: (_, py, d) => set(d.t, y.invert(py) / 1000 / state.peak),
      nudge: (_, up, d) => set(d.t, d.value + 0.02 * up),
      led: ["ArrowLeft", "ArrowRight"],
    });
    dots.select(".finger").attr("r", 12.5);
  }

  // The same curve at a constant peak, and of the same mean rate.
  const twin = (state) => {
    const level = { ...state, meta: "none", lock: false };
    return { ...level, peak: (state.peak * d3.mean(ratesOf(state))) / d3.mean(ratesOf(level)) };
  };
  const actions = [{ label: "Compare with its constant twin", to: twin }];
  const hint = "Drag a circle: at the left the peak, the end of the warmup (on the axis), or the start of the cooldown; at the right the peak of an update.";
  workbench(el, { table, kernel, start, name: "schedule", model: about, picture, hint, actions });
}

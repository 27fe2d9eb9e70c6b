// Explorers whose answers take Python: streams, budgets, and paths between weights.
import { takeAway } from "./export.js";
import { element, form, places, points, say, score, short, table, tidy } from "./form.js";
import { axes, d3, drawing, group, handles, join, plane, write } from "./plane.js";
import { SILENT } from "./runs.js";
import { among, canonical, flag, within } from "./state.js";
import { frame } from "./workbench.js";

const SLOW = 150; // milliseconds after which an answer is said to be on its way
const [BLUE, ORANGE] = ["#0173b2", "#de8f05"];
const whole = d3.format(",");
const rough = d3.format(",.3~r");

// Answers by question: stored ones, and the kernel's where there is one. One question is under way at a
// time, and the first that is then wanted comes next, so of a moving control only the newest counts.
function asker(kernel, stored, changed) {
  const known = new Map(Object.entries(stored));
  const keyOf = (question) => JSON.stringify(Object.values(question));
  const open = () => wanted.filter((each) => !known.has(keyOf(each)));
  let wanted = [];
  let asked = null;
  kernel?.whenever(() => asked !== null);
  kernel?.listen(({ kind, id, answer, refused }) => {
    if (kind === "answer") known.set(id, refused ? { refused } : answer);
    if (id !== asked?.id) return;
    if (kind === "answer") asked = null;
    next();
    changed();
  });
  function next() {
    const [question] = open();
    if (asked || !kernel || !question) return;
    asked = { id: keyOf(question), since: performance.now() };
    kernel.send({ verb: "ask", id: asked.id, request: question });
    setTimeout(changed, SLOW + 1);
  }
  return {
    want(questions) {
      wanted = questions;
      next();
      return questions.map((each) => [each, known.get(keyOf(each))]);
    },
    // How the answer comes on, in words, or "" where there is nothing to say.
    progress() {
      const count = open().length;
      const waited = asked ? performance.now() - asked.since : 0;
      if (!kernel && count) return "This page has no answer to this setting; in JupyterLab there is one.";
      if (!count || waited < SLOW) return "";
      if (kernel?.isSilent()) return `${SILENT}: queued`;
      return `computing …${wanted.length > 1 ? ` ${wanted.length - count} of ${wanted.length}` : ""}`;
    },
  };
}

// Above, the images of each update; below, how many classes of each dataset it brings.
function stream({ picture, drawPlane, more }, data, state, [[, answer]]) {
  const { counts, images } = answer;
  const svg = drawing(picture, 132 + 20 * data.datasets.length, "What arrives in each update", 760);
  const [width, height] = svg.property("extent");
  const x = d3.scaleBand(d3.range(images.length), [176, width - 4]).paddingInner(0.06);
  const y = d3.scaleBand(data.datasets, [98, height - 34]).paddingInner(0.08);
  const up = d3.scaleLinear([0, d3.max(images)], [90, 24]);
  const middle = (n) => x(n) + x.bandwidth() / 2;
  const every = Math.ceil(20 / x.step()); // label one update of so many
  const label = (parent, rows) =>
    join(parent, "text", rows)
      .attr("x", (d) => d[0])
      .attr("y", (d) => d[1])
      .attr("text-anchor", (d) => d[3] ?? "middle")
      .text((d) => d[2]);
  const bars = group(svg, "amounts")
    .attr("role", "img")
    .attr("aria-label", `Images of updates: ${images.join(", ")}`);
  join(bars, "rect", images)
    .attr("x", (_, n) => x(n))
    .attr("width", x.bandwidth())
    .attr("y", up)
    .attr("height", (d) => 90 - up(d));
  label(bars, [
    [168, 88, "images", "end"],
    ...images.map((d, n) => [middle(n), up(d) - 4, every > 2 || n % every ? "" : d]),
  ]);
  const most = d3.max(counts, (row) => d3.max(row));
  const rows = join(group(svg, "counts"), "g", counts)
    .attr("role", "img")
    .attr("aria-label", (row, k) => `Classes of ${data.datasets[k]} per update: ${row.join(", ")}`)
    .attr("transform", (_, k) => `translate(0,${y(data.datasets[k])})`);
  join(rows, "rect", (row) => row)
    .attr("x", (_, n) => x(n))
    .attr("width", x.bandwidth())
    .attr("height", y.bandwidth())
    .attr("fill-opacity", (d) => (d ? 0.3 + (0.7 * d) / most : 0.03));
  rows.each(function (row, k) {
    const base = y.bandwidth() - 5;
    const numbers = row.map((d, n) => [middle(n), base, d && x.bandwidth() > 15 ? d : ""]);
    label(d3.select(this), [...numbers, [168, base, `${data.datasets[k]} (${d3.sum(row)})`, "end"]]).classed(
      "light",
      (_, n) => row[n] > 0.5 * most,
    );
  });
  label(group(svg, "updates"), [
    ...images.map((_, n) => [middle(n), height - 18, n % every ? "" : n + 1]),
    [(176 + width) / 2, height - 2, "update"],
  ]);
  const same = data.stored.filter((run) =>
    Object.entries(run.state).every(([key, value]) => state[key] === value),
  );
  drawPlane({ stored: data.stored, pinned: same.map((run) => ({ ...run, colour: ORANGE })) });
  const ways = same.map((run) => [
    run.label,
    run.way == null ? "–" : points(run.way),
    score(run, 0),
    score(run, 1),
  ]);
  more.replaceChildren(
    same.length
      ? table(
          ["stored runs of this stream (%)", "A_KA on the way", "A_KA at the end", "A_ZS at the end"],
          ways,
        )
      : element("p", {}, "No stored run follows this stream; a point of the plane leads to one that does."),
  );
  return {
    sentence: answer.sentence,
    away: { profile: "cpu", changes: answer.changes },
  };
}

// Steps per update that each method has for the cost of some steps of full fine-tuning.
function budget({ picture, more }, data, state, found) {
  const costs = new Map(found.map(([question, cost]) => [question.method, cost]));
  const full = costs.get("full");
  if (!full) return null;
  const steps = state.total / state.updates;
  const rows = [...costs].map(([method, cost]) => {
    const ratio = cost.memory / full.memory;
    const bought = (steps * full.step * (1 + data.slack) - cost.end * ratio) / (cost.step * ratio);
    return { method, cost, ratio, steps: Math.max(0, Math.floor(bought)) };
  });
  const named = (method) => data.names[method] ?? method;
  const names = data.each.method; // those still to come have their places
  const svg = drawing(picture, 70 + 24 * names.length, "Steps per update by method", 760);
  const [width, height] = svg.property("extent");
  const x = d3.scaleLinear([0, d3.max(rows, (row) => row.steps) || 1], [112, width - 44]);
  const y = d3.scaleBand(d3.reverse(names), [height - 44, 20]).padding(0.2);
  axes(svg, x, y, ["steps per update; dashed: full fine-tuning", ""], 6, named);
  join(group(svg, "amounts"), "rect", rows)
    .attr("x", x(0))
    .attr("y", (d) => y(d.method))
    .attr("height", y.bandwidth())
    .attr("width", (d) => x(d.steps) - x(0));
  join(group(svg, "rule"), "path", [rows[0].steps]).attr("d", (d) => `M${x(d)},${height - 44}V20`);
  const ends = names.map((name) => rows.find((row) => row.method === name) ?? { method: name });
  join(group(svg, "values"), "text", ends)
    .attr("x", (d) => x(d.steps ?? 0) + 6)
    .attr("y", (d) => y(d.method) + y.bandwidth() / 2 + 4)
    .text((d) => (d.steps === 0 ? "not one" : d.steps ? whole(d.steps) : "…"));
  const giga = (value) => rough(value / 1e9);
  const head = [
    "method",
    "GFLOPs per step",
    "memory (GB)",
    "memory (× full)",
    "adjusted GFLOPs per step",
    "adjusted GFLOPs at an update’s end",
    "steps per update",
    "samples per update",
  ];
  const cells = rows.map(({ method, cost, ratio, steps: n }) => [
    named(method),
    giga(cost.step),
    giga(cost.memory),
    rough(ratio),
    giga(cost.step * ratio),
    giga(cost.end * ratio),
    whole(n),
    whole(n * state.batch),
  ]);
  more.replaceChildren(table(head, cells));
  const total = Number(((state.total * full.step) / 1e9).toPrecision(10)); // fewer digits would cost a step
  return {
    sentence: `The cost of ${whole(state.total)} steps of full fine-tuning of the model “${state.model}” at batch ${state.batch}, ${rough(total)} GFLOPs, over ${whole(state.updates)} updates: ${rough(steps)} of those steps per update.`,
    away: {
      command: `cmpt budget --model ${state.model} --batch ${state.batch} --tasks ${state.updates} --total ${total}`,
    },
  };
}

// Both scores over the share of the fine-tuned weights, and the same path in the plane.
function path({ picture, drawPlane }, data, state, found, change) {
  const known = d3.sort(
    found.map(([question, answer]) => ({ share: question.share, at: [answer.A_KA, answer.A_ZS, answer.GM] })),
    (d) => d.share,
  );
  const [first, last] = [known[0], known.at(-1)];
  if (first.share !== 0 || last.share !== 1) return null;
  const next = Math.max(
    1,
    known.findIndex((d) => d.share >= state.share),
  );
  const [low, high] = [known[next - 1], known[next]];
  const exact = [low, high].find((d) => d.share === state.share);
  const at = d3.interpolate(low.at, high.at)((state.share - low.share) / (high.share - low.share));
  const svg = drawing(picture, 330, "Both scores over the share of the fine-tuned weights", 640);
  const [width, height] = svg.property("extent");
  const x = d3.scaleLinear([0, 1], [44, width - 60]);
  const y = d3.scaleLinear(d3.extent(known.flatMap((d) => d.at.slice(0, 2))), [height - 44, 26]).nice();
  axes(svg, x, y, ["share of the fine-tuned weights", "score (%)"]);
  const lines = ["A_KA", "A_ZS"].map((name, k) => ({ name, k, colour: [BLUE, ORANGE][k] }));
  join(group(svg, "lines"), "path", lines)
    .attr("stroke", (d) => d.colour)
    .attr("stroke-width", 2)
    .attr("d", ({ k }) =>
      d3.line(
        (d) => x(d.share),
        (d) => y(d.at[k]),
      )(known),
    );
  join(group(svg, "marks"), "path", lines.flatMap((d) => known.map((each) => ({ ...d, each }))))
    .attr("fill", (d) => d.colour)
    .attr("transform", (d) => `translate(${x(d.each.share)},${y(d.each.at[d.k])})`)
    .attr("d", (d) => d3.symbol([d3.symbolCircle, d3.symbolSquare][d.k], 36)());
  join(group(svg, "ends"), "text", lines)
    .attr("x", x(1) + 10)
    .attr("y", (d) => y(last.at[d.k]) + 4)
    .call(write, (d) => d.name);
  join(group(svg, "rule"), "path", [0]).attr("d", `M${x(state.share)},${height - 44}V26`);
  const name = "Share of the fine-tuned weights";
  const { step = 0.05 } = data.fields.find(({ key }) => key === "share"); // a page has stored shares
  const mark = { key: "share", name, now: state.share, least: 0, most: 1, words: short(state.share), x: x(state.share), y: 26 };
  handles(group(svg, "knees"), [mark], 8, {
    move: (px) => change({ share: x.invert(px) }),
    nudge: (right, up) => change({ share: state.share + step * (right + up) }),
  });
  const trail = known.map((d) => d.at);
  drawPlane({
    front: [first.at, last.at],
    own: [{ trail, colour: BLUE }],
    predicted: { at, half: [0, 0], weight: exact ? 1 : 0.4 },
  });
  const words = (values) =>
    ["A_KA", "A_ZS", "GM"]
      .slice(0, values.length)
      .map((name, k) => `${name} ${points(values[k])}%`)
      .join(", ");
  const mean = d3.interpolate(first.at.slice(0, 2), last.at.slice(0, 2))(state.share);
  const weights = `${state.share},${short(1 - state.share)}`;
  return {
    sentence: `${state.share.toFixed(2)} of the fine-tuned weights, by ${state.rule}: ${exact ? words(at) : "being scored"} (${data.subset} images per dataset). A mean of both ends' scores, dashed in the plane, would be ${words(mean)}.`,
    away: {
      command: `cmpt merge ${state.rule} tuned.safetensors before.safetensors --weights ${weights} --out merged.safetensors`,
      Python: `cmp.merge("${state.rule}", [tuned, before], weights=(${weights.replace(",", ", ")}))`,
    },
  };
}

const KINDS = {
  stream: [stream, "command", "YAML", "Python"],
  budget: [budget, "command"],
  path: [path, "command", "Python"],
};

// What the layers of a plane are, where it is not as for settings.
const LAYERS = {
  stream: { pinned: "of this stream" },
  path: { front: "a mean of both ends’ scores", own: "the path", predicted: "this share" },
};

// What a state can be, from the fields of a table.
export function model({ fields }) {
  const kindOf = (field) => (field.options ? among(field.options.map(([value]) => value)) : field.range ? within(field.range) : flag);
  const kinds = Object.fromEntries(fields.map((field) => [field.key, kindOf(field)]));
  const numbers = fields.filter(({ options, range }) => range && !options);
  const settle = (state) => ({ ...state, ...Object.fromEntries(numbers.map((field) => [field.key, tidy(field, state[field.key])])) });
  return { kinds, settle };
}

export function explore(el, { table: data, kernel, start }) {
  const [chart, ...forms] = KINDS[data.kind];
  const place = places(el, ["presets", "controls", "said", "warned", "waiting", "picture", "plane", "more", "away"]);
  const sides = element("div", { class: "sides" }, place.picture, place.plane);
  const { presets, controls, said, warned, waiting, more, away } = place;
  el.append(presets, controls, said, warned, waiting, sides, more, away);
  const { kinds, settle } = model(data);
  const rules = { defaults: data.defaults, settle, keyOf: canonical };
  const bench = frame(el, { name: data.kind, rules, kinds, kernel, start, presets: data.presets, place, draw });
  const change = (changes) => bench.act({ change: changes });
  const ask = asker(kernel, data.answers, () => draw(true));
  const drawForm = form(place.controls, change, bench.warn);
  const layers = plane(place.plane, {
    preview() {},
    choose: (run) => run.state && change(run.state),
    key: LAYERS[data.kind],
  });
  let taken = {};
  const names = [...forms, ...(kernel ? [] : ["link"])];
  const drawAway = takeAway(place.away, names, () => ({ ...taken, profiles: data.profiles, chapter: data.chapter, link: bench.address() }));

  function drawPlane(shown) {
    place.plane.hidden = false;
    layers(shown);
  }
  // What a state asks: the values of its fields, and where `each` has a key, that once per value.
  function questions(state) {
    const asked = data.fields.filter((field) => !field.local);
    const own = Object.fromEntries(asked.map(({ key }) => [key, state[key]]));
    const [[key, values] = []] = Object.entries(data.each);
    const all = key ? values.map((value) => ({ ...own, [key]: value })) : [];
    return key in own ? [own, ...all.filter((each) => each[key] !== own[key])] : all.length ? all : [own];
  }

  function draw(everything) {
    const { state } = bench.model;
    drawForm(data.fields, state);
    const answers = ask.want(questions(state));
    const refusal = answers.find(([, answer]) => answer?.refused)?.[1].refused;
    const found = answers.filter(([, answer]) => answer && !answer.refused);
    const drawn = found.length ? chart({ ...place, drawPlane }, data, state, found, change) : null;
    if (refusal) bench.warn(`Refused: ${refusal}.`);
    place.waiting.textContent = ask.progress();
    const isOld = !drawn && (refusal || place.waiting.textContent);
    for (const each of [sides, place.more, place.said]) each.classList.toggle("old", Boolean(isOld));
    if (drawn) say(place.said, drawn.sentence);
    taken = drawn ? drawn.away : { missing: refusal ? `Refused: ${refusal}.` : place.waiting.textContent || "computing …" };
    if (!everything) return;
    drawAway();
    bench.drawn();
  }

  place.plane.hidden = true;
  bench.begin();
}

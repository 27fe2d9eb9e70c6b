// What a batch is made of: a point in the triangle of pool, update and buffer, and where such runs end.
import { percent, points, short, signed } from "./form.js";
import { d3, drawing, group, handles, hovered, join, write } from "./plane.js";
import { among, flag, optional, shares as sharesKind } from "./state.js";
import { workbench } from "./workbench.js";

const NAMES = ["pool P", "update D", "buffer B"];
const KEYS = ["pretraining", "update", "buffer"];
const COLOURS = ["#0173b2", "#de8f05", "#029e73"];
const HEATS = { A_KA: "what is learned", A_ZS: "what is kept", gain: "what is kept at equal learning" };
const UNITS = { A_KA: "A_KA (%)", A_ZS: "A_ZS (%)", gain: "A_ZS at equal A_KA (points)" };
const VALUES = Object.keys(HEATS);
const BAR = { width: 12, height: 96, parts: 24 };
const whole = (value) => String(value).replace("-", "−");
const inWords = (shares) => shares.map((share, k) => `${NAMES[k]} ${percent(share)}`).join(", ");
const isThirds = (shares) => d3.every(shares, (share) => Math.abs(share - 1 / 3) < 1e-6);

// Samples of a batch from each source, as `cmp.mixtures.batch_counts` has them; a test compares the two.
export function batchCounts(shares, batch, isBufferEmpty) {
  const counts = shares.map((share) => Math.floor(batch * share + 1e-9));
  let left = batch - d3.sum(counts);
  shares.forEach((share, k) => share > 0 && left > 0 && (counts[k]++, left--));
  const [p, d, b] = counts;
  if (!isBufferEmpty) return counts;
  if (shares[0] > 0 && shares[1] > 0) return [p + Math.floor(b / 2), d + b - Math.floor(b / 2), 0];
  return shares[0] > 0 ? [p + b, 0, 0] : [0, d + b, 0];
}

// The shares of an update, on the way to those of the last one where they change.
function sharesAt({ shares, last }, update, updates) {
  const passed = update / Math.max(updates - 1, 1);
  return last ? shares.map((share, k) => (1 - passed) * share + passed * last[k]) : shares;
}

// How often images are seen over all updates, in one decimal: one of the `pool`, one of the first update as
// `fresh` and when it is `replayed` from the buffer, and one of the `last` update.
export function timesSeen(mixture, { batch, steps, tasks, pool, update }) {
  const counts = d3.range(tasks).map((task) => batchCounts(sharesAt(mixture, task, tasks), batch, task === 0));
  const times = {
    pool: d3.sum(counts, ([p]) => p) / pool,
    fresh: counts[0][1] / update,
    replayed: d3.sum(counts.slice(1), ([, , b], n) => b / (n + 1)) / update, // of n + 1 updates in the buffer
    last: counts.at(-1)[1] / update,
  };
  return Object.fromEntries(Object.entries(times).map(([key, value]) => [key, Number((steps * value).toFixed(1))]));
}

// What a state can be, what it means, and what is known of it.
export function model(table) {
  const parts = table.parts;
  const grid = new Map(
    table.grid.map(({ at, value }) => [at.join(), { at: at.map((each) => each / parts), value }]),
  );
  const third = [1 / 3, 1 / 3, 1 / 3];

  // Whole parts that sum to one: what rounding leaves over goes to the largest share, except for the one that
  // `moved`, which stays as it was set. Thirds stay.
  function rounded(shares, moved = -1) {
    const positive = shares.map((share) => Math.max(0, share));
    const total = d3.sum(positive);
    if (d3.max(positive, (share) => Math.abs(share / total - 1 / 3)) < 0.5 / parts) return third;
    const whole = positive.map((share) => Math.round((share / total) * parts));
    whole[d3.maxIndex(whole, (share, k) => (k === moved ? -1 : share))] += parts - d3.sum(whole);
    return whole.map((share) => share / parts);
  }

  // The other end of a change that begins: half of the update's share goes to the pool, or all goes halfway
  // to the update where it has none.
  const apart = ([p, d, b]) => (d > 0 ? [p + d / 2, d / 2, b] : [p / 2, 0.5, b / 2]);

  // A slider that moves takes from the two others, or gives to them, in their proportion.
  function settle(state, changes) {
    const next = { ...state };
    const moved = KEYS.findIndex((key) => key in changes && !("shares" in changes));
    if (moved >= 0) {
      const share = changes[KEYS[moved]];
      const others = d3.sum(next.shares) - next.shares[moved];
      next.shares = next.shares.map((each, k) =>
        k === moved ? share : others ? (each / others) * (1 - share) : (1 - share) / 2,
      );
    }
    next.shares = rounded(next.shares, moved);
    next.last = next.varies ? rounded(next.last ?? apart(next.shares)) : null;
    KEYS.forEach((key, k) => (next[key] = next.shares[k]));
    return next;
  }

  const fields = () => [
    ...KEYS.map((key, k) => ({
      key,
      label: `Share of ${NAMES[k]}`,
      range: [0, 1],
      step: 1 / parts,
      percent: true,
    })),
    { key: "heat", label: "Colour", options: Object.entries(HEATS) },
    { key: "varies", label: "Change over the updates" },
  ];

  function lookUp(shares) {
    if (shares === third) return table.third;
    return grid.get(shares.map((share) => Math.round(share * parts)).join());
  }

  const presets = table.presets.filter(({ state }) => !state.varies);
  const nameOf = (shares) =>
    presets.find(({ state }) => d3.every(shares, (share, k) => Math.abs(share - state.shares[k]) < 1e-6))?.label ??
    `P/D/B ${shares.map((share) => short(100 * share)).join("/")}`;

  // The first update in whose batches a source has a share and yet no sample, as `cmp.mixtures.check_shares` has it.
  function starved(mixture, size) {
    const { tasks, batch } = table.streams[size];
    for (const task of d3.range(tasks)) {
      const now = sharesAt(mixture, task, tasks);
      const counts = batchCounts(now, batch, task === 0);
      const k = now.findIndex((share, n) => share > 0 && !counts[n] && !(task === 0 && KEYS[n] === "buffer"));
      if (k >= 0) return `update ${task + 1} would have no sample of ${NAMES[k]} in a batch`;
    }
    return null;
  }

  function describe(state, size = "cpu") {
    const { shares } = state;
    const last = state.varies && d3.some(shares, (share, k) => Math.abs(share - state.last[k]) > 1e-6) ? state.last : null;
    const changes = isThirds(shares) ? {} : Object.fromEntries(KEYS.map((key, k) => [`mixture.${key}`, shares[k]]));
    if (last) changes["mixture.last"] = last;
    const found = last ? null : lookUp(shares);
    const predicted = found?.value && {
      at: found.value,
      half: table.misses,
      words: `Interpolated between the nearest stored mixtures${found.value[2] == null ? "" : `; A_ZS is ${signed(found.value[2])} points from that of plain fine-tuning that learns as much`}. After ±: by how much stored mixtures are missed when they are left out.`,
    };
    const seen = timesSeen({ shares, last }, table);
    return {
      label: nameOf(shares) + (last ? ` to ${nameOf(last)}` : ""),
      sentence: `${upper(inWords(shares))}${last ? `, in the last update ${inWords(last)}` : ""}. Each image of the pool is seen ${points(seen.pool)} times, of the first update ${points(seen.fresh + seen.replayed)} times, of the last ${points(seen.last)} times.`,
      changes,
      parameters: [...["pool", "update", "buffer"].map((key, k) => [key, shares[k]]), ["stream_seed", 0]],
      lacks: last ? ["a change over the updates"] : [],
      predicted,
      refused: starved({ shares, last }, size),
    };
  }

  const kinds = { shares: sharesKind, last: optional(sharesKind), varies: flag, heat: among(VALUES) };
  return { settle, fields, describe, kinds, misses: table.misses, grid, rounded };
}

const upper = (text) => text[0].toUpperCase() + text.slice(1);

export function explore(el, { table, kernel, start }) {
  const parts = table.parts;
  const about = model(table);
  const { grid, rounded } = about;
  const known = (n) => [...grid.values()].filter((each) => each.value?.[n] != null);
  let drawn = "";

  // The triangle coloured by what runs came to, with lines of equal value, as far as there are runs.
  function drawHeat(svg, at, key, size) {
    const n = VALUES.indexOf(key);
    const shown = known(n);
    const colour = d3.scaleSequential(
      d3.extent(shown, (each) => each.value[n]),
      d3.interpolateCividis,
    );
    const hull = d3.polygonHull(table.runs.map((run) => at(run.shares)));
    const clip = join(group(svg, "hull"), "clipPath", [hull]).attr("id", "hull-of-mixtures");
    join(clip, "path", [hull]).attr("d", (d) => `M${d.join("L")}Z`);
    drawBar(svg, colour, UNITS[key]);
    const clipped = (name) => group(svg, name).attr("clip-path", "url(#hull-of-mixtures)");
    join(clipped("heat"), "circle", shown)
      .attr("r", size)
      .attr("cx", (d) => at(d.at)[0])
      .attr("cy", (d) => at(d.at)[1])
      .attr("fill", (d) => colour(d.value[n]));
    const lines = levels(shown, n, d3.ticks(...colour.domain(), 6), at);
    join(clipped("contours"), "path", lines).attr("d", (d) => d.path);
    join(group(svg, "levels"), "text", apart(lines.filter((d) => d.label)))
      .attr("x", (d) => d.label[0])
      .attr("y", (d) => d.label[1])
      .text((d) => whole(d.level));
  }

  // What the colours are.
  function drawBar(svg, colour, name) {
    const [low, high] = colour.domain();
    const y = d3.scaleLinear([low, high], [BAR.height, 0]);
    const bar = group(svg, "scale").attr("transform", "translate(6,34)");
    join(bar, "rect", d3.quantize(d3.interpolateNumber(low, high), BAR.parts))
      .attr("width", BAR.width)
      .attr("height", BAR.height / BAR.parts + 0.5)
      .attr("y", (_, n) => BAR.height * (1 - (n + 1) / BAR.parts))
      .attr("fill", colour);
    join(bar, "text", [[name, 0, -12], ...y.ticks(4).map((d) => [whole(d), BAR.width + 4, y(d) + 4])])
      .attr("x", (d) => d[1])
      .attr("y", (d) => d[2])
      .call(write, (d) => d[0]);
  }

  function picture(place, state, change, pins) {
    const side = Math.min((place.clientWidth || 640) - 60, 340);
    const height = 34 + side * 0.866 + 108;
    const svg = drawing(place, height, "The triangle of mixtures, and how often an image is seen", 640);
    const [width] = svg.property("extent");
    const corners = [
      [width / 2, 34],
      [width / 2 - side / 2, 34 + side * 0.866],
      [width / 2 + side / 2, 34 + side * 0.866],
    ];
    const at = (shares) => [0, 1].map((axis) => d3.sum(shares, (share, k) => share * corners[k][axis]));
    if (drawn !== state.heat + width) drawHeat(svg, at, state.heat, side / parts); // which takes long
    drawn = state.heat + width;
    join(group(svg, "rim"), "path", [corners])
      .attr("class", "clicked")
      .attr("d", (d) => `M${d.join("L")}Z`)
      .on("click", (event) => {
        const to = rounded(barycentric(corners, d3.pointer(event, svg.node())));
        const far = (shares) => d3.sum(shares, (share, k) => (share - to[k]) ** 2);
        change({ [state.varies && far(state.last) < far(state.shares) ? "last" : "shares"]: to });
      });
    join(group(svg, "corners"), "text", corners)
      .attr("x", (d) => d[0])
      .attr("y", (d, k) => d[1] + (k ? 20 : -10))
      .attr("text-anchor", "middle")
      .text((_, k) => NAMES[k]);
    join(group(svg, "mixtures"), "circle", table.runs)
      .attr("class", "clicked")
      .attr("r", 3)
      .attr("transform", (d) => `translate(${at(d.shares)})`)
      .on("click", (_, d) => change({ shares: d.state.shares, varies: false }))
      .call(hovered);
    join(group(svg, "marks"), "circle", pins)
      .attr("r", 9)
      .attr("stroke", (d) => d.colour)
      .attr("transform", (d) => `translate(${at(d.state.shares)})`);
    const ends = state.varies ? [state.shares, state.last] : [];
    join(group(svg, "way"), "path", [ends.map(at)]).attr("d", d3.line());
    const ways = [
      ...(state.varies ? [["last", state.last, "Mixture of the last update", "last update"]] : []),
      ["shares", state.shares, state.varies ? "Mixture of the first update" : "Mixture", "first update"],
    ];
    const made = ways.map(([key, shares, name, tag]) => {
      const [x, y] = at(shares);
      return { key, shares, name, tag, x, y, now: Math.round(100 * shares[0]), words: inWords(shares) };
    });
    join(group(svg, "tags"), "text", state.varies ? made : [])
      .attr("x", (d) => d.x + 13)
      .attr("y", (d) => d.y - 9)
      .text((d) => d.tag);
    handles(group(svg, "handles"), made, 9, {
      move: (x, y, d) => change({ [d.key]: rounded(barycentric(corners, [x, y])) }),
      nudge(right, up, d) {
        const next = [...d.shares];
        const other = up > 0 === d.shares[1] >= d.shares[2] ? 1 : 2; // keeps update and buffer near
        next[0] += up / parts;
        next[up ? other : 2] += (up ? -up : right) / parts;
        if (!up) next[1] -= right / parts;
        if (d3.min(next) > -1e-9) change({ [d.key]: rounded(next) });
      },
    });
    // how often an image is seen
    const seen = timesSeen({ shares: state.shares, last: state.varies ? state.last : null }, table);
    const rows = [
      ["pool", [[0, seen.pool]]],
      ["first update", [[1, seen.fresh], [2, seen.replayed]]],
      ["last update", [[1, seen.last]]],
    ];
    const x = d3.scaleLinear([0, most], [96, width - 110]);
    const top = 34 + side * 0.866 + 54;
    const shown = group(svg, "seen");
    shown
      .selectAll("text.name")
      .data(["Times that an image is seen: new + replayed"])
      .join("text")
      .attr("class", "name")
      .attr("x", width / 2)
      .attr("y", top - 8)
      .attr("text-anchor", "middle")
      .text((d) => d);
    join(shown, "g", rows)
      .attr("transform", (_, k) => `translate(0,${top + 16 * k})`)
      .each(function ([name, bars]) {
        const row = d3.select(this);
        const values = bars.map(([, value]) => value);
        const sum = values.length > 1 ? ` = ${points(d3.sum(values))}` : "";
        const numbers = values.map(points).join(" + ") + sum;
        const end = x(d3.sum(bars, ([, value]) => value)) + 6;
        join(row, "text", [[name, 90, "end"], [numbers, end, "start"]])
          .attr("x", (d) => d[1])
          .attr("y", 10)
          .attr("text-anchor", (d) => d[2])
          .text((d) => d[0]);
        let left = 0;
        const spans = bars.map(([k, value]) => ({ k, from: left, to: (left += value) }));
        join(row, "rect", spans)
          .attr("x", (d) => x(d.from))
          .attr("width", (d) => x(d.to) - x(d.from))
          .attr("height", 12)
          .attr("fill", (d) => COLOURS[d.k]);
      });
  }

  for (const run of table.runs) run.state = { shares: rounded(run.shares), varies: false };
  // the longest bars: all of a batch from one source
  const [pool, all] = [[1, 0, 0], [0, 0, 1]].map((shares) => timesSeen({ shares, last: null }, table));
  const most = Math.max(pool.pool, all.fresh + all.replayed);
  const hint = "Drag the circle, or click in the triangle. A small dot is a stored mixture; where there is no colour, none was run.";
  workbench(el, { table, kernel, start, name: "mixture", model: about, picture, hint, views: ["heat"] });
}

// Labels that do not lie on an earlier one.
const apart = (lines) =>
  lines.reduce((kept, d) => {
    const near = ({ label: [x, y] }) => Math.abs(x - d.label[0]) < 18 && Math.abs(y - d.label[1]) < 14;
    return kept.some(near) ? kept : [...kept, d];
  }, []);

function barycentric([[ax, ay], [bx, by], [cx, cy]], [x, y]) {
  const area = (by - cy) * (ax - cx) + (cx - bx) * (ay - cy);
  const p = ((by - cy) * (x - cx) + (cx - bx) * (y - cy)) / area;
  const d = ((cy - ay) * (x - cx) + (ax - cx) * (y - cy)) / area;
  return [p, d, 1 - p - d];
}

// Lines of equal value over the known points, from the triangles between them.
function levels(known, n, ticks, at) {
  const places = known.map((each) => at(each.at));
  const { triangles } = d3.Delaunay.from(places);
  return ticks.map((level) => {
    const parts = [];
    for (let k = 0; k < triangles.length; k += 3) {
      const corner = [0, 1, 2].map((j) => triangles[k + j]);
      const cuts = [];
      for (const j of [0, 1, 2]) {
        const [a, b] = [corner[j], corner[(j + 1) % 3]];
        const [from, to] = [known[a].value[n], known[b].value[n]];
        if (from < level === to < level) continue;
        const share = (level - from) / (to - from);
        cuts.push(places[a].map((each, axis) => each + share * (places[b][axis] - each)));
      }
      if (cuts.length === 2) parts.push(cuts);
    }
    return {
      level,
      path: parts.map(([a, b]) => `M${a.map(d3.format(".1f"))}L${b.map(d3.format(".1f"))}`).join(""),
      label: parts[parts.length >> 1]?.[0],
    };
  });
}

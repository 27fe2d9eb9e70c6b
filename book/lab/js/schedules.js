// The learning rate of an update and a step, as `cmp.schedules` has it; a test compares the two.
const FLOOR = 1e-3;

const aboveFloor = (share) => FLOOR + (1 - FLOOR) * share;
const halfCosine = (step, steps) => (step < steps ? (1 + Math.cos((Math.PI * step) / steps)) / 2 : 0);

// Steps of warmup and cooldown. Parts of an update are rounded up.
export function durations({ name, warmup, cooldown }, steps, curves) {
  const settings = curves[name].settings;
  const count = (share, key) => (settings.includes(key) ? Math.ceil(share * steps - 1e-9) : 0);
  const W = count(warmup, "warmup");
  return [W, Math.min(count(cooldown, "cooldown"), steps - W)];
}

const METAS = {
  none: () => 1,
  cosine({ t, N, W }) {
    const length = Math.max(N - W, 1);
    return t ? halfCosine(t * length + 1, (t + 1) * length) : 1;
  },
  rsqrt({ t, N, W }) {
    const unit = Math.max(W, 1);
    return Math.sqrt(((t + 1) * unit) / (t * N + unit));
  },
  "rsqrt-continued"({ t, N, W, C }) {
    const unit = Math.max(W, 1);
    return Math.sqrt(unit / Math.max(t * (N - C - unit) + unit, unit));
  },
  "rsqrt-recovered": () => 1,
  geometric: ({ t, s }) => s.decay ** t,
  free: ({ t, s }) => s.peaks[t] ?? 1,
};
METAS["cosine-dynamic"] = METAS.cosine;

function rsqrt({ s, t, N, W, C, peak }, n) {
  const unit = Math.max(W, 1);
  const shift = s.shift + (s.meta === "rsqrt-recovered" ? t * (N - C - W) : 0);
  return aboveFloor(peak * Math.sqrt(unit / (n - W + unit + shift)));
}

const cosineTop = ({ peak }) => aboveFloor(peak);
const line = ({ N, C }, n) => Math.min(1, (N - n) / Math.max(C, 1));

// Each curve after its warmup, and where the warmup leads if that is not the peak.
const CURVES = {
  constant: [({ peak }) => peak],
  linear: [({ peak, N, W }, n) => (peak * (N - n)) / Math.max(N - W, 1)],
  cosine: [
    ({ s, t, N, W, peak }, n) => {
      const length = N - W;
      const step = n - W + 1;
      if (s.meta !== "cosine-dynamic") return aboveFloor(peak * halfCosine(step, length));
      return aboveFloor(halfCosine(t * length + step, (t + 1) * length));
    },
    cosineTop,
  ],
  rsqrt: [
    (task, n) => rsqrt(task, n) * (task.C ? Math.min(1, (task.N - 1 - n) / task.C) : 1),
    (task) => rsqrt(task, task.W),
  ],
  wsd: [(task, n) => task.peak * line(task, n)],
  "wsd-sqrt": [({ peak, N, C }, n) => peak * (1 - Math.sqrt(Math.max(n - (N - C), 0) / Math.max(C, 1)))],
  infinite: [
    (task, n) => {
      const { s, t, N, W, C } = task;
      const first = N - W - C;
      const trunk = N - C;
      const settled = Math.min(t * trunk + Math.min(n, trunk - 1) - W + 1, first);
      return (s.level + (1 - s.level) * halfCosine(settled, first)) * line(task, n);
    },
  ],
};

export const drawable = (name, meta) => name in CURVES && meta in METAS;

// The peaks of all updates, as multiples of the first.
export function peaks(s, tasks, N, curves) {
  const [W, C] = durations(s, N, curves);
  return Array.from({ length: tasks }, (_, t) => METAS[s.meta]({ s, t, N, W, C }));
}

// The rates of all steps, one after another.
export function rates(s, tasks, N, curves) {
  const [W, C] = durations(s, N, curves);
  const [curve, top = ({ peak }) => peak] = CURVES[s.name];
  const found = new Float64Array(tasks * N);
  peaks(s, tasks, N, curves).forEach((peak, t) => {
    const task = { s, t, N, W, C, peak };
    const warms = t === 0 || !curves[s.name].overStream;
    for (let n = 0; n < N; n++) {
      const rate = n < W && warms ? (top(task) * (n + 1)) / W : curve(task, n);
      found[t * N + n] = s.peak * rate;
    }
  });
  return found;
}

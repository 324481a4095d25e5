// People and their joints, found in the browser by the network that export.py wrote.
//
//     source -> frame     what a file, the camera or the sample shows, in its own pixels
//     frame  -> boxes     where people may be: people.js
//     boxes  -> crops     uint8 (B, size, size, 3), the square around each box: boxMap, cut
//     crops  -> joints    the network: x, y in pixels of the crop, and a confidence
//     joints -> frame     the same map backwards, then drawn
//
// A pixel's coordinate is that of its centre, as in crops.py. A box is [x, y, width, height] in frame pixels.

import {Tracker, ask, findPeople} from "./people.js";

const $ = id => document.getElementById(id);
const make = (tag, properties) => Object.assign(document.createElement(tag), properties);
const frame = make("canvas").getContext("2d", {willReadFrequently: true}), view = $("view").getContext("2d");

const LARGEST = 4096, SMALLEST_VIEW = 640;       // longest side: of an image at most, of the view at least
const ROUNDED = 2 ** 20, SMALLEST_BOX = 0.04;    // as crops.py; of the longest side, smaller drags are slips
const ERROR_SECONDS = 10;                        // for which an error stands
const NEAR = 1 / 20;                             // of a crop: joints of it and of its mirror image agree
const COLOURS = {"r-": "rgb(255 140 0)", "l-": "rgb(0 200 255)"}, MIDDLE = "rgb(120 220 90)";
const OF_PERSON = ["white", "yellow", "magenta", "lime", "red", "aqua"];         // box and joints, in turn
const LIMBS = ["r-ankle/r-knee", "r-knee/r-hip", "r-hip/pelvis", "l-hip/pelvis", "l-hip/l-knee",
  "l-knee/l-ankle", "pelvis/thorax", "thorax/upper neck", "upper neck/head top", "r-wrist/r-elbow",
  "r-elbow/r-shoulder", "r-shoulder/thorax", "l-shoulder/thorax", "l-shoulder/l-elbow", "l-elbow/l-wrist"];

// ------------------------------------------------------------------------------- the ONNX file

/** metadata_props of an ONNX file: field 14 of the protobuf message, whose fields are a key and a value. */
export function metadata(bytes) {
  const text = ([, from, to]) => new TextDecoder().decode(bytes.subarray(from, to));
  const pairs = [...fields(bytes, 0, bytes.length)].filter(([number]) => number === 14);
  return Object.fromEntries(pairs.map(([, from, to]) => [...fields(bytes, from, to)].map(text)));
}

/** The fields of a protobuf message that hold bytes: [number, first byte, end]. */
function* fields(bytes, at, end) {
  const varint = () => {
    let value = 0;
    for (let place = 1, byte = 128; byte > 127; place *= 128) value += ((byte = bytes[at++]) & 127) * place;
    return value;
  };
  while (at < end) {
    const key = varint(), kind = key % 8;     // 0: varint, 1: 8 bytes, 2: length and bytes, 5: 4 bytes
    const length = kind === 2 ? varint() : kind === 1 ? 8 : kind === 5 ? 4 : (varint(), 0);
    if (kind === 2) yield [Math.floor(key / 8), at, at + length];
    at += length;
  }
}

// ------------------------------------------------------------------------------- frame to crop

/** Frame -> crop: u = scale (x - center) + middle, scale = size / side, middle = (size - 1) / 2. */
export function boxMap([x, y, width, height], size, enlargement) {
  const scale = size / (Math.max(width, height) * enlargement), middle = (size - 1) / 2;
  return {scale, x: middle - scale * (x + (width - 1) / 2), y: middle - scale * (y + (height - 1) / 2)};
}

/** For each pixel u of the crop along one axis: two cells around it and the weight of the second; or null.
 *  A cell is the mean of `shrink` pixels: x = (u - shift) / scale, cell = (x - (shrink - 1) / 2) / shrink. */
function axis(size, scale, shift, cells, shrink) {
  const inside = cell => Math.min(Math.max(cell, 0), cells - 1);
  return Array.from({length: size}, (_, u) => {
    let at = ((u - shift) / scale - (shrink - 1) / 2) / shrink;
    if (shrink > 1) at = Math.round(at * ROUNDED) / ROUNDED;      // or it falls just before a cell it is on
    const low = Math.floor(at);
    return at >= -0.5 && at < cells - 0.5 ? [inside(low), inside(low + 1), at - low] : null;
  });
}

/** The pixels of a canvas through a map -> crop (size, size, 3), as crops.cut does, to Pillow's roundings:
 *  averaged down first where the crop shrinks them to half or less, then bilinear, black outside. */
export function cut(context, {scale, x, y}, size) {
  const {width, height} = context.canvas, crop = new Uint8Array(size * size * 3);
  const shrink = Math.max(1, Math.floor(1 / Math.sqrt(scale * scale)));
  const along = axis(size, scale, x, Math.ceil(width / shrink), shrink), columns = along.filter(Boolean);
  const down = axis(size, scale, y, Math.ceil(height / shrink), shrink), rows = down.filter(Boolean);
  if (!columns.length || !rows.length) return crop;

  const left = columns[0][0], top = rows[0][0];      // the cells that the crop needs, and their pixels
  const W = columns.at(-1)[1] - left + 1, H = rows.at(-1)[1] - top + 1, cells = new Uint8Array(W * H * 3);
  const w = Math.min(W * shrink, width - left * shrink), h = Math.min(H * shrink, height - top * shrink);
  const pixels = context.getImageData(left * shrink, top * shrink, w, h).data;
  for (let Y = 0, cell = 0; Y < H; Y++) for (let X = 0; X < W; X++, cell += 3) {
    const xEnd = Math.min((X + 1) * shrink, w), yEnd = Math.min((Y + 1) * shrink, h);
    const count = (xEnd - X * shrink) * (yEnd - Y * shrink), share = Math.floor(2 ** 24 / count) / 2 ** 24;
    let red = count >> 1, green = red, blue = red;
    for (let row = Y * shrink; row < yEnd; row++)
      for (let p = 4 * (row * w + X * shrink), end = 4 * (row * w + xEnd); p < end; p += 4) {
        red += pixels[p]; green += pixels[p + 1]; blue += pixels[p + 2];
      }
    cells[cell] = red * share; cells[cell + 1] = green * share; cells[cell + 2] = blue * share;
  }

  for (let v = 0; v < size; v++) for (let u = 0; u < size; u++) {
    if (!along[u] || !down[v]) continue;
    const [x0, x1, dx] = along[u], [y0, y1, dy] = down[v];
    for (let c = 0; c < 3; c++) {
      const at = (column, row) => cells[3 * ((row - top) * W + column - left) + c];
      const upper = at(x0, y0) + (at(x1, y0) - at(x0, y0)) * dx;
      const lower = at(x0, y1) + (at(x1, y1) - at(x0, y1)) * dx;
      crop[3 * (v * size + u) + c] = upper + (lower - upper) * dy;
    }
  }
  return crop;
}

// ------------------------------------------------------------------------------- the network

let ort, session, size, enlargement, names = [], partners = [], limbs = [];

/** Fetch and start student.onnx. Everything that depends on the network is read from the file. */
async function load() {
  const answer = await fetch("student.onnx");
  if (!answer.ok) throw Error("student.onnx is missing: run python export.py demo/student.onnx");
  const bytes = new Uint8Array(await answer.arrayBuffer()), facts = metadata(bytes);
  const gpu = await navigator.gpu?.requestAdapter().catch(() => null);
  const folder = new URL("node_modules/onnxruntime-web/dist/", import.meta.url).href;
  ort = await import(`${folder}ort.${gpu ? "webgpu" : "wasm"}.min.mjs`).catch(() => {
    throw Error("onnxruntime-web is missing: run npm install in the folder demo");
  });
  const numThreads = globalThis.crossOriginIsolated ? Math.min(navigator.hardwareConcurrency, 4) : 1;
  Object.assign(ort.env.wasm, {numThreads, wasmPaths: folder});
  let fastest = Infinity, failure;
  for (const provider of gpu ? ["webgpu", "wasm"] : ["wasm"]) try {      // the faster one stays
    const options = {executionProviders: [provider], logSeverityLevel: 3};
    const made = await ort.InferenceSession.create(bytes, options);
    size = Number(facts.input_size ?? made.inputMetadata[0].shape[1]);
    const runs = [];
    for (let n = 0; n < 3; n++) runs.push((await predict(new Uint8Array(size * size * 3), made)).time);
    if (median(runs) > fastest) continue;
    [fastest, session] = [median(runs), made];
    $("backend").textContent = provider === "webgpu" ? "WebGPU" : `WebAssembly, threads: ${numThreads}`;
  } catch (error) {
    failure = error;
  }
  if (!session) throw Error(`student.onnx cannot be loaded: ${String(failure).slice(0, 160)}`);
  enlargement = Number(facts.box_enlargement ?? 1.25);
  names = facts.joints?.split(", ") ?? [];
  partners = names.map(name => names.indexOf(name.replace(/^[lr]-/, side => side === "l-" ? "r-" : "l-")));
  limbs = LIMBS.map(limb => limb.split("/").map(name => names.indexOf(name)));
  limbs = limbs.filter(ends => Math.min(...ends) >= 0);
  $("model").textContent = `${facts.network ?? "student"}, ${(bytes.length / 1e6).toFixed(1)} MB`;
  $("parameters").textContent = facts.parameters?.replace(/\B(?=(...)+$)/g, ",") ?? "not stated";
  $("crop").textContent = `${size} × ${size} pixels`;
  $("source").textContent = facts.source ?? "not stated";
}

/** Crops (B, size, size, 3) -> joints (B, K, 3): x, y in pixels of the crop, confidence; and ms a crop. */
async function predict(crops, network = session) {
  const began = performance.now(), count = crops.length / (size * size * 3);
  const input = new ort.Tensor("uint8", crops, [count, size, size, 3]);
  const out = await network.run({[network.inputNames[0]]: input}), time = (performance.now() - began) / count;
  const ofRank = rank => Object.values(out).find(part => part.dims.length === rank);
  const {data: sure, dims: [, K]} = ofRank(2), xy = ofRank(3).data;  // (B, K), (B, K, 2), by whatever names
  const joint = n => [xy[2 * n], xy[2 * n + 1], sure[n]], range = length => Array.from({length}, (_, n) => n);
  return {joints: range(count).map(b => range(K).map(k => joint(b * K + k))), time};
}

const median = values => values.toSorted((a, b) => a - b)[values.length >> 1];

// ------------------------------------------------------------------------------- one frame after another

let source = null;                // {name, width, height, draw(), moving, mirrored, next(callback), stop()}
let chosen = null, dragged = null;     // the box that the visitor drew, or is drawing; null: everybody
let people = new Map(), tracker;       // {id: person} as drawn, and who follows them: a new one starts anew
let paused = false, refresh = () => {};
let finished = [], times = [];         // when the last frames were done, what the network took for a crop

const threshold = () => Number($("threshold").value);
const sure = joints => joints.filter(joint => joint[2] >= threshold());
const colour = id => OF_PERSON[id % OF_PERSON.length];

async function run() {
  for (;;) {
    const reason = new Promise(resolve => { refresh = resolve; });          // to look again
    if (source.moving && !paused) source.next(refresh);                     // may come while it still looks
    await look(source).catch(error => {
      const message = `the network failed: ${error.message ?? error}`;
      told = message;
      if ($("message").className !== "error") say(message, true);           // not in each frame
    });
    await reason;
  }
}

const following = () => source.moving && !paused && $("track").checked;

async function look(from) {
  const {width, height} = from, mine = tracker, follow = following(), still = paused || !from.moving;
  if (!paused) from.draw();
  if (still) people = new Map(), paint();
  const box = [...mine.people.values()][0]?.box ?? chosen;               // paused: where the person is by now
  const steps = follow ? mine.next(width, height) : chosen ? ask([box], true) : findPeople(width, height);
  let step = steps.next();
  while (!step.done) {
    const changed = () => mine !== tracker || follow !== following();
    if (still && !chosen) tell(progress(step.value));
    if (!follow) await new Promise(shown => setTimeout(shown));
    if (changed()) return;                           // the visitor wants something else meanwhile
    const found = await peopleIn(step.value);
    if (changed()) return;
    step = steps.next(found);
  }
  people = new Map(step.value.entries());
  finished = [...finished.slice(-60), performance.now()];
  paint();
  if (!still) return report(from.title, mine);
  const {joints} = people.get(0) ?? {}, count = people.size;
  tell(`${from.name}${from.note ?? ""}: ${chosen ? `${sure(joints).length} of ${joints.length} joints`
    : count > 1 ? `${count} people` : count ? "1 person" : "nobody"} found`);
}

const progress = ({tight, done, all}) =>
  `looking${tight ? " closer" : ""}: ${done} of ${all}${tight ? "" : " windows"}`;

/** A request of people.js -> a person for each of its boxes. */
async function peopleIn({boxes, tight, mirrored}) {
  const maps = boxes.map(box => boxMap(box, size, tight ? enlargement : 1));
  const crops = new Uint8Array(boxes.length * size * size * 3);
  maps.forEach((map, n) => crops.set(cut(frame, map, size), n * size * size * 3));
  let {joints, time} = await predict(crops);
  times = [...times.slice(-30), time];
  if (mirrored && names.length) {
    const {joints: others} = await predict(mirror(crops));
    joints = joints.map((ofCrop, n) => agree(ofCrop, others[n]));
  }
  return maps.map(({scale, x, y}, n) => (
    {box: boxes[n], joints: joints[n].map(([u, v, sure]) => [(u - x) / scale, (v - y) / scale, sure])}));
}

/** Crops (B, size, size, 3) with left and right exchanged: column u becomes column size - 1 - u. */
export const mirror = crops => crops.map((_, at) => crops[at + 3 * (size - 1 - 2 * (Math.floor(at / 3) % size))]);

/** Joints (K, 3) of a crop and of its mirror image -> their mean where they agree, weighted by confidence, else
 *  the surer one with half of its confidence. predict.py averages distributions, which the file does not give:
 *  where two sure ones are apart in x and in y, a quarter is left there. */
export function agree(joints, mirrored) {
  return joints.map(([x, y, sure], k) => {
    const [u, v, other] = mirrored[partners[k]], across = size - 1 - u;
    if (Math.hypot(across - x, v - y) > NEAR * size)
      return sure > other ? [x, y, sure / 2] : [across, v, other / 2];
    const part = other / (sure + other || 1);
    return [x + part * (across - x), y + part * (v - y), (sure + other) / 2];
  });
}

/** Frame and skeletons onto a canvas of any size, mirrored where asked. */
function drawSkeletons(context) {
  const mirror = $("mirror").checked, zoom = context.canvas.width / source.width;
  context.setTransform(mirror ? -zoom : zoom, 0, 0, zoom, mirror ? context.canvas.width : 0, 0);
  context.drawImage(frame.canvas, 0, 0);
  context.lineCap = "round";
  for (const [id, person] of people) drawSkeleton(context, person, colour(id));
  context.globalAlpha = 1;
}

function drawSkeleton(context, {box, joints}, fillStyle) {
  const longest = Math.max(source.width, source.height);
  const line = Math.min(Math.max(box[2] / 70, box[3] / 70, longest / 250), longest / 110);
  const opacity = confidence => 0.3 + 0.7 * confidence;
  context.lineWidth = line;
  for (const [a, b] of limbs) {
    const unsure = Math.min(joints[a]?.[2], joints[b]?.[2]);
    if (!(unsure >= threshold())) continue;
    context.globalAlpha = opacity(unsure);
    context.strokeStyle = COLOURS[names[a].slice(0, 2)] ?? MIDDLE;
    context.beginPath();
    for (const k of [a, b]) context.lineTo(joints[k][0] + 0.5, joints[k][1] + 0.5);    // from the edge
    context.stroke();
  }
  Object.assign(context, {fillStyle, strokeStyle: "black", lineWidth: line / 4});
  for (const [x, y, confidence] of sure(joints)) {
    context.globalAlpha = opacity(confidence);
    context.beginPath();
    context.arc(x + 0.5, y + 0.5, line, 0, 7);
    context.fill();
    context.stroke();
  }
}

function paint() {
  drawSkeletons(view);
  const line = Math.max(source.width, source.height) / 320;
  const boxes = dragged ? [["white", dragged]] : Array.from(people, ([id, {box}]) => [colour(id), box]);
  view.setLineDash([4 * line, 3 * line]);
  for (const [strokeStyle, box] of boxes) {
    Object.assign(view, {strokeStyle, lineWidth: line});
    view.strokeRect(...box);
  }
  view.setLineDash([]);
}

let clearing, told = "";               // told: what is said when an error has stood long enough

function say(message, error = false) {
  $("message").className = error ? "error" : "";
  $("message").setAttribute("role", error ? "alert" : "status");
  $("message").textContent = message;
  clearTimeout(clearing);
  if (error && source) clearing = setTimeout(() => say(source.moving && !paused ? source.title : told || source.title),
                                            1000 * ERROR_SECONDS);
}

/** Says how the search in a still image goes; an error stands for its seconds before that. */
function tell(message) {
  told = message;
  if ($("message").className !== "error") say(message);
}

/** Says in a video what changes, over no other message: progress until somebody or nobody is found, and nobody
 *  when those who were lost have been given up, too. */
function report(title, {search, step, lost, ids}) {
  const {textContent: said} = $("message"), nobody = `${title} (nobody found)`;
  const message = people.size ? title : search && !ids && said !== nobody ? `${title} (${progress(step.value)})`
    : search || lost.size ? said : nobody;
  if (said.startsWith(title) && said !== message) say(message);
}

function showFigures() {
  finished = finished.filter(when => when > performance.now() - 2000);
  const frames = finished.length - 1, seconds = (finished.at(-1) - finished[0]) / 1000;
  $("fps").textContent = source.moving && !paused && frames > 0 ? (frames / seconds).toFixed(1) : "–";
  $("time").textContent = times.length ? `${median(times).toFixed(1)} ms` : "–";
  const scale = source.scale ?? 1;                   // numbers are in pixels of the file
  const round = ({box}) => box.map(side => Math.round(side / scale)).join(", ");
  $("box").textContent = Array.from(people.values(), round).join("\n") || "–";
  if ($("list").open) $("joints").replaceChildren(...[...people.values()].flatMap(({joints}) => joints.map(
    (joint, k) => {
      const [x, y] = joint.map(value => (value + 0.5) / scale - 0.5);
      const row = make("tr"), cells = [names[k] ?? k, ...[x, y, joint[2]].map(value => value.toFixed(2))];
      row.append(...cells.map(textContent => make("td", {textContent})));
      return row;
    })));
}

// ------------------------------------------------------------------------------- sources

// Stored image -> upright, by its Exif orientation: setTransform's a, b, c, d, and the corner in sides upright.
const UPRIGHT = {1: [1, 0, 0, 1, 0, 0], 2: [-1, 0, 0, 1, 1, 0], 3: [-1, 0, 0, -1, 1, 1], 4: [1, 0, 0, -1, 0, 1],
  5: [0, 1, 1, 0, 0, 0], 6: [0, 1, -1, 0, 1, 0], 7: [0, -1, -1, 0, 1, 1], 8: [0, -1, 1, 0, 0, 1]};
const OTHERS = /\.(tiff?|p[bgpn]m|pfm|avif|hei[cf]|jxl|jp2)$/i;         // images that not every browser reads

/** The Exif orientation of a WebP file, which is set to 1 in its bytes: some browsers ignore it, some do not. */
export function takeOrientation(bytes) {
  const data = new DataView(bytes.buffer), name = at => String.fromCharCode(...bytes.subarray(at, at + 4));
  if (name(0) !== "RIFF" || name(8) !== "WEBP") return 1;
  for (let at = 12, next; at + 8 < bytes.length; at = next) {
    const length = data.getUint32(at + 4, true);
    next = at + 8 + length + length % 2;
    if (name(at) !== "EXIF") continue;
    const start = at + 8 + (name(at + 8) === "Exif" ? 6 : 0), little = name(start).startsWith("II");
    const first = start + data.getUint32(start + 4, little) + 2;
    for (let n = 0; n < data.getUint16(first - 2, little); n++)
      if (data.getUint16(first + 12 * n, little) === 0x0112) {
        const orientation = data.getUint16(first + 12 * n + 8, little);
        data.setUint16(first + 12 * n + 8, 1, little);
        return orientation in UPRIGHT ? orientation : 1;
      }
  }
  return 1;
}

let asked = 0;                         // number of the last source asked for: an older one is dropped

function show(next) {
  if (next.stop !== source?.stop) source?.stop?.();
  source = next;
  finished = times = [];
  Object.assign(frame.canvas, {width: next.width, height: next.height});
  const zoom = Math.max(1, SMALLEST_VIEW / Math.max(next.width, next.height));
  Object.assign(view.canvas, {width: zoom * next.width, height: zoom * next.height});
  $("mirror").checked = Boolean(next.mirrored);
  $("camera").setAttribute("aria-pressed", !!next.live);
  $("pause").disabled = !next.moving;
  choose(null);
  pause(false);
}

function pause(on) {
  paused = on;
  $("pause").setAttribute("aria-pressed", on);
  source.pause?.(on);
  told = "";
  if (!on) say(source.title);
  refresh();
}

async function open(file) {
  if (!file?.size) return say("that was no file, or an empty one: drop, paste or choose an image", true);
  const {name} = file;
  if (file.type.startsWith("video/"))
    return play(name, video => Object.assign(video, {src: URL.createObjectURL(file), loop: true}),
                () => `${name} cannot be read as a video`);
  const number = ++asked;
  try {
    const bytes = new Uint8Array(await file.arrayBuffer());
    let orientation = 1;
    try { orientation = takeOrientation(bytes); } catch { /* damaged Exif: as it is stored */ }
    const image = await createImageBitmap(orientation === 1 ? file : new Blob([bytes], {type: file.type}));
    if (number !== asked) return;
    const shrink = Math.max(1, image.width / LARGEST, image.height / LARGEST), turned = orientation > 4;
    const stored = [image.width, image.height].map(side => Math.ceil(side / shrink));
    const [width, height] = turned ? stored.toReversed() : stored, [a, b, c, d, x, y] = UPRIGHT[orientation];
    const note = shrink > 1 ? `, reduced to ${width} × ${height} pixels` : "";
    show({name, title: name, note, scale: 1 / shrink, width, height, draw() {
      frame.fillStyle = "black";                     // under what is transparent, as in predict.py
      frame.fillRect(0, 0, width, height);
      frame.setTransform(a, b, c, d, x * width, y * height);
      frame.drawImage(image, 0, 0, ...stored);
      frame.resetTransform();
    }});
  } catch {
    const why = OTHERS.test(name) ? " by this browser: convert it to JPEG or PNG" : "";
    if (number === asked) say(`${name} cannot be read as an image${why}`, true);
  }
}

function camera() {
  const facingMode = $("facing").value;
  if (source.live) source.stop();                    // a phone opens one at a time
  say("Waiting for the camera");
  play("camera", async video => {
    const wanted = {facingMode, width: 640, height: 480};
    video.srcObject = await navigator.mediaDevices.getUserMedia({video: wanted});
  }, ({name, message}) => !navigator.mediaDevices ? "the camera needs https or localhost"
    : name === "NotAllowedError" ? "the camera was refused: allow it beside the page's address"
      : name === "NotFoundError" ? "no camera was found" : `the camera failed: ${message}`);
}

async function play(name, connect, explain) {
  const number = ++asked, video = make("video", {muted: true, playsInline: true});
  const stop = () => {
    video.srcObject?.getTracks().forEach(track => track.stop());
    video.pause();
    URL.revokeObjectURL(video.src);
  };
  try {
    await connect(video);
    await video.play();
    if (number !== asked) return stop();
    if (!video.videoWidth) throw Error("it has no picture");
    video.srcObject?.getTracks()[0].addEventListener("ended", () => {
      if (source.stop === stop) sample();
      say("the camera stopped", true);
    });
    const start = () => number === asked && show({
      name, title: `Video: ${name}`, width: video.videoWidth, height: video.videoHeight,
      moving: true, live: !!video.srcObject, stop,
      mirrored: video.srcObject && $("facing").value === "user",
      pause: on => on ? video.pause() : video.play().catch(() => {}),
      draw: () => frame.drawImage(video, 0, 0, frame.canvas.width, frame.canvas.height),
      next: done => video.requestVideoFrameCallback?.(done) ?? requestAnimationFrame(done)});
    start();
    video.onresize = start;                          // a phone was turned
  } catch (error) {
    stop();
    if (number !== asked) return;
    if (source.live && name === "camera") sample();
    say(explain(error), true);
  }
}

function sample() {
  const moving = !matchMedia("(prefers-reduced-motion: reduce)").matches;
  asked++;
  show({name: "sample", title: "A person drawn by this page", width: 480, height: 480, moving,
        next: done => requestAnimationFrame(done),
        draw: () => drawPerson(frame, moving ? performance.now() : 0)});
}

/** A person of capsules who faces us and waves, on 480 x 480 pixels. Lengths in body heights: synthetic.py. */
export function drawPerson(context, time) {
  const tall = 400, wave = Math.sin(time / 400), sway = Math.sin(time / 1500);
  const bone = ([x, y], degrees, length) => {        // where it ends; 0 degrees: hangs down, 90: to our right
    const angle = degrees * Math.PI / 180;
    return [x + tall * length * Math.sin(angle), y + tall * length * Math.cos(angle)];
  };
  const capsule = (colour, a, b, radius) => {        // strokes: its shadow, itself, the light on it
    const strokes = [[colour, 2, 0], ["#0004", 2, 0], [colour, 1.6, 0.1], ["#fff3", 0.7, 0.3]];
    for (const [strokeStyle, width, up] of strokes) {
      Object.assign(context, {strokeStyle, lineWidth: radius * tall * width, lineCap: "round"});
      context.beginPath();
      for (const [x, y] of [a, b]) context.lineTo(x - up * radius * tall, y - up * radius * tall);
      context.stroke();
    }
  };
  for (const [colour, y] of [["#aebcc2", 0], ["#95897a", 395]]) {
    context.fillStyle = colour;
    context.fillRect(0, y, 480, 480 - y);
  }
  const [skin, hair, shirt, trousers, shoes] = ["#d8a078", "#4a3020", "#c03a34", "#384a78", "#40302a"];
  const pelvis = [240 + 25 * sway, 258], thorax = bone(pelvis, 180 + 4 * sway, 0.275);
  const neck = bone(thorax, 180, 0.035), arms = [];
  const angles = [[-1, 7, 3, 18, 8 + 6 * wave], [1, 8, 5, 105, 165 + 22 * wave]];
  for (const [side, thigh, shin, upper, lower] of angles) {
    const hip = bone(pelvis, 90 * side, 0.055), knee = bone(hip, side * thigh - 4 * sway, 0.245);
    const ankle = bone(knee, side * shin - 4 * sway, 0.246), shoulder = bone(thorax, 90 * side, 0.105);
    const elbow = bone(shoulder, side * upper, 0.18), wrist = bone(elbow, side * lower, 0.15);
    capsule(trousers, hip, knee, 0.05);
    capsule(trousers, knee, ankle, 0.034);
    capsule(shoes, bone(ankle, 0, 0.025), bone(ankle, 70 * side, 0.04), 0.024);
    capsule(trousers, hip, pelvis, 0.06);
    arms.push([shirt, shoulder, thorax, 0.042], [shirt, shoulder, elbow, 0.034],
              [skin, elbow, wrist, 0.025], [skin, wrist, bone(wrist, side * lower, 0.04), 0.023]);
  }
  const head = (up, across = 0) => bone(bone(neck, 180 - 5 * sway, up), 90, across);
  capsule(shirt, bone(pelvis, 180, 0.06), bone(thorax, 0, 0.05), 0.085);
  capsule(skin, thorax, neck, 0.032);
  capsule(hair, head(0.1), head(0.08), 0.062);
  capsule(skin, head(0.03), head(0.075), 0.052);
  for (const across of [-0.02, 0.02]) capsule(hair, head(0.08, across), head(0.075, across), 0.007);
  capsule("#a04438", head(0.03, -0.012), head(0.03, 0.012), 0.005);
  for (const part of arms) capsule(...part);
}

// ------------------------------------------------------------------------------- what a visitor does

/** A box around one person, in whole pixels, or null for everybody. */
function choose(next) {
  const within = (value, least, most) => Math.min(Math.max(Math.round(value), least), most);
  if (next) {
    const [width, height] = [within(next[2], 8, source.width), within(next[3], 8, source.height)];
    next = [within(next[0], 0, source.width - width), within(next[1], 0, source.height - height),
            width, height];
  }
  chosen = next;
  tracker = new Tracker(chosen);
  people = new Map();
  told = "";
  if ($("message").className === "error") say(source.title);
  refresh();
}

function save() {
  const picture = make("canvas", {width: source.width, height: source.height});
  drawSkeletons(picture.getContext("2d"));
  picture.toBlob(blob => {
    if (!blob) return say("this browser cannot save a picture of this size", true);
    const href = URL.createObjectURL(blob);
    make("a", {href, download: `${source.name.replace(/\.[^.]*$/, "")}-pose.jpg`}).click();
    setTimeout(() => URL.revokeObjectURL(href), 60_000);
  }, "image/jpeg", 0.92);
}

function listen() {
  const buttons = {choose: () => $("file").click(), sample,
                   camera: () => source.live ? sample() : camera(), pause: () => pause(!paused),
                   everybody: () => choose(null), save};
  for (const [name, action] of Object.entries(buttons)) $(name).onclick = () => action();
  $("file").onchange = () => { open($("file").files[0]); $("file").value = ""; };
  $("facing").onchange = () => { if (source.live) camera(); };
  $("threshold").oninput = () => {
    $("shown").textContent = threshold().toFixed(2);
    chosen ? refresh() : paint();
  };
  $("mirror").onchange = paint;
  $("track").onchange = () => choose(chosen);
  $("list").ontoggle = showFigures;
  document.ondragover = event => { event.preventDefault(); document.body.className = "dropping"; };
  document.ondragleave = () => { document.body.className = ""; };
  document.ondrop = event => {
    event.preventDefault();
    document.ondragleave();
    open(event.dataTransfer.files[0]);
  };
  document.onpaste = event => open(event.clipboardData.files[0]);
  setInterval(showFigures, 250);

  let corner = null;
  const place = event => {                           // in pixels of the frame, from its edges
    const shown = view.canvas.getBoundingClientRect(), x = (event.clientX - shown.left) / shown.width;
    const y = (event.clientY - shown.top) / shown.height, inside = at => Math.min(Math.max(at, 0), 1);
    return [inside($("mirror").checked ? 1 - x : x) * source.width, inside(y) * source.height];
  };
  view.canvas.onpointerdown = event => {
    if (event.button !== 0 || !event.isPrimary) return;
    corner = place(event);
    view.canvas.setPointerCapture(event.pointerId);
  };
  view.canvas.onpointermove = event => {
    if (!corner || !event.isPrimary) return;
    const [x, y] = place(event);
    dragged = [Math.min(x, corner[0]), Math.min(y, corner[1]),
               Math.abs(x - corner[0]), Math.abs(y - corner[1])];
    paint();
  };
  view.canvas.onpointerup = view.canvas.onpointercancel = event => {
    if (!event.isPrimary) return;                    // another finger
    const least = Math.max(8, SMALLEST_BOX * Math.max(source.width, source.height));
    if (event.type === "pointerup" && Math.min(...dragged?.slice(2) ?? [0]) >= least) choose(dragged);
    corner = dragged = null;
    paint();
  };
  view.canvas.onkeydown = event => {
    const step = Math.ceil(Math.max(source.width, source.height) / 50);
    const ways = {ArrowLeft: [-step, 0], ArrowRight: [step, 0], ArrowUp: [0, -step], ArrowDown: [0, step]};
    if (event.key === "Escape") choose(null);
    if (!(event.key in ways)) return;
    event.preventDefault();
    const [dx, dy] = ways[event.key], {width, height} = source;
    const [x, y, w, h] = [...people.values()][0]?.box ?? chosen ??
      [width / 8, height / 8, 0.75 * width, 0.75 * height];
    choose(event.shiftKey ? [x, y, w + dx, h + dy] : [x + dx, y + dy, w, h]);
  };
}

let early;                                           // a file dropped while the network is loading
document.ondragover = event => event.preventDefault();     // else it replaces the page
document.ondrop = event => { event.preventDefault(); [early] = event.dataTransfer.files; };
try {
  await load();
  document.querySelectorAll("button").forEach(button => { button.disabled = false; });
  sample();
  listen();
  if (early) open(early);
  run();
} catch (error) {
  document.querySelectorAll("button").forEach(button => { button.disabled = true; });
  say(error.message, true);
}

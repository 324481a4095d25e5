// People in images and videos, found by a pose network alone: people.py and videos.py with their numbers.
//
//     person    {box, joints}: box [x, y, width, height], joints (K, 3): x, y in frame pixels, confidence
//     request   {boxes, tight, mirrored, done, all}: yielded by the generators below, which go on with the
//               people in the boxes, tight ones with a margin; done of all boxes came before. mirrored: their
//               mirror images count, too, for which people.py has flip_test
//
// Nothing here draws or runs a network: demo.js answers the requests, and may draw between them.

const WINDOW_SIDES = [1, 0.75, 0.55], STEP = 0.4, THIN = 6;
const SUREST = 8, CANDIDATE = 0.2, PERSON = 0.6, STILL = 0.52, MOST = 24;
const SURE = 0.1, LEAST = 6, BEYOND = 0.15, ROUNDS = 2;
const SAME = [0.6, 0.9, 0.5], SAME_CANDIDATE = [0.75, 0.95, 1], CLEAR = 0.3, CLOSE = 0.1;
const LOOK_AGAIN = 30, LOOK_SOON = 5;

const portion = 4;         // crops of a request: the page stands still while the network looks at them
const boxSpeed = 0.4;      // of the box of somebody followed, towards the joints: it shakes less than they do

// ------------------------------------------------------------------------------- people in an image

/** Squares [x, y, side, side] that cover an image: the whole of it, then smaller and smaller ones. */
export function windows(width, height) {
  const longer = Math.max(width, height);
  const squares = [[(width - longer) / 2, (height - longer) / 2, longer, longer]];
  for (const fraction of WINDOW_SIDES) {
    const side = fraction * Math.max(Math.min(width, height), longer / THIN);
    const [columns, rows] = [width, height].map(size => places(size - side, STEP * side));
    squares.push(...rows.flatMap(y => columns.map(x => [x, y, side, side])));
  }
  return squares;
}

/** Where windows begin: from 0 to room, at most a step apart; in the middle where the image is smaller. */
function places(room, step) {
  const first = Math.min(room, 0) / 2, last = Math.max(room, room / 2);
  const gaps = Math.max(0, Math.ceil(room / step));
  return Array.from({length: gaps + 1}, (_, n) => first + (last - first) * n / Math.max(gaps, 1));
}

const sum = values => values.reduce((total, value) => total + value, 0);
const confidences = ({joints}) => joints.map(joint => joint[2]).sort((a, b) => b - a);     // (K,), falling

/** Mean confidence of the surest joints, in [0, 1]: is a person, or half of one, there? */
export function personScore(person) {
  const surest = confidences(person).slice(0, SUREST);
  return sum(surest) / surest.length;
}

/** The box of a person: around the sure joints, at least LEAST of them, and what is beyond these. */
export function boxOfJoints(person) {
  const least = Math.min(SURE, confidences(person)[LEAST - 1]);
  const joints = person.joints.filter(joint => joint[2] >= least);
  const [xs, ys] = [0, 1].map(k => joints.map(joint => joint[k]));
  const [x, y] = [xs, ys].map(values => Math.min(...values) + 0.5);      // a box begins at a pixel's edge
  const [width, height] = [Math.max(...xs) + 0.5 - x, Math.max(...ys) + 0.5 - y];
  const beyond = BEYOND / 2 * Math.max(width, height, 1);
  return [x - beyond, y - beyond, width + 2 * beyond, height + 2 * beyond];
}

/** The intersection of two boxes, over their union and over the smaller of them. */
export function shared([ax, ay, aw, ah], [bx, by, bw, bh]) {
  const across = Math.min(ax + aw, bx + bw) - Math.max(ax, bx);
  const down = Math.min(ay + ah, by + bh) - Math.max(ay, by);
  const area = Math.max(across, 0) * Math.max(down, 0);
  return [area / (aw * ah + bw * bh - area), area / Math.min(aw * ah, bw * bh)];
}

/** The fraction of a person's clear joints that are where the same joints of another are. */
export function sharedJoints(person, other) {
  const side = Math.min(...[person, other].map(one => Math.max(...boxOfJoints(one).slice(2))));
  const pairs = person.joints.map((joint, k) => [joint, other.joints[k]]);
  const clear = pairs.filter(([joint]) => joint[2] >= CLEAR);
  const close = clear.filter(([[x, y], [u, v]]) => Math.hypot(x - u, y - v) <= CLOSE * side);
  return close.length / Math.max(clear.length, 1);
}

/** Is this nobody of the others? Somebody seen again has a similar box, one within it, or the joints. */
export function isNew(person, others, same = SAME) {
  return [...others].every(other =>
    [...shared(boxOfJoints(person), boxOfJoints(other)), sharedJoints(person, other)]
      .every((part, n) => part <= same[n]));
}

/** The people, the highest sum of confidences first, without those who are one of them seen again. */
export function suppress(people, same = SAME) {
  const kept = [];
  const sureness = person => sum(confidences(person));
  for (const person of people.toSorted((a, b) => sureness(b) - sureness(a)))
    if (isNew(person, kept, same)) kept.push(person);
  return kept;
}

/** Those who may become people when they are looked at again: not too unsure, too alike or too many. */
export function candidates(people) {
  return suppress(people.filter(person => personScore(person) >= CANDIDATE), SAME_CANDIDATE).slice(0, MOST);
}

/** Asks for the people in boxes, a portion in each request, and returns them. */
export function* ask(boxes, tight, mirrored = false) {
  const people = [], most = mirrored ? portion / 2 : portion;
  for (let done = 0; done < boxes.length; done += most)
    people.push(...yield {boxes: boxes.slice(done, done + most), tight, mirrored, done, all: boxes.length});
  return people;
}

/** Everybody in an image of this size, as `suppress` orders them; empty where nobody is. */
export function* findPeople(width, height) {
  let people = yield* ask(windows(width, height), false);
  for (let round = 1; round <= ROUNDS; round++)
    people = yield* ask(candidates(people).map(boxOfJoints), true, round === ROUNDS);
  return suppress(people.filter(person => personScore(person) >= PERSON)
    .map(person => ({...person, box: boxOfJoints(person)})));
}

// ------------------------------------------------------------------------------- people in a video

/** People followed from frame to frame: each is looked for around the joints that it had in the last one.
 *
 *  Everybody is looked for from the first frame, every LOOK_AGAIN frames, and sooner where somebody gets lost
 *  or nobody is there. In videos.py this takes one frame, here a number of requests a frame, so that the video
 *  keeps moving. Who is lost is also looked for around the last joints, and given up when the second look around
 *  ends in vain. With a chosen box only one person is followed, who is looked for there. */
export class Tracker {
  people = new Map();      // {id: person}, as the next one
  lost = new Map();
  missed = [];             // ids of lost people whom a look around missed
  since = LOOK_AGAIN;      // frames since the last look around began
  ids = 0;
  search = null;           // the look around, or that in the chosen box, while it lasts; and what it has yielded
  step = null;
  sought = [];             // ids of who was lost when it began

  constructor(chosen = null, requests = 1, speed = boxSpeed) {
    Object.assign(this, {chosen, requests, speed});
  }

  /** The next frame -> a Map of id to person; a person keeps its id. */
  *next(width, height) {
    const follow = (box, joints) => box.map((old, k) => old + this.speed * (joints[k] - old));
    const before = new Map([...this.people, ...this.lost]), people = new Map(), lost = new Map();
    const boxes = Array.from(this.people.values(), person => follow(person.box, boxOfJoints(person)));
    const seen = [...yield* ask(boxes, true),
                  ...yield* ask(Array.from(this.lost.values(), boxOfJoints), true, true)];
    [...before].forEach(([id, was], n) => {
      const least = this.people.has(id) ? STILL : PERSON;
      if (personScore(seen[n]) >= least && isNew(seen[n], people.values())) people.set(id, seen[n]);
      else if (!this.chosen) lost.set(id, was);
    });
    for (const ids of ["missed", "sought"]) this[ids] = this[ids].filter(id => lost.has(id));
    const soon = this.missed.length < lost.size || !(people.size || lost.size);
    const again = this.since >= LOOK_AGAIN || soon && this.since >= LOOK_SOON;
    if (!this.search && (this.chosen ? !people.size : again)) {
      this.search = this.chosen ? ask([this.chosen], true) : findPeople(width, height);
      this.step = this.search.next();
      Object.assign(this, {sought: [...lost.keys()], since: 0});
    }
    for (let n = 0; this.search && n < this.requests; n++) {
      this.step = this.search.next(yield this.step.value);
      if (!this.step.done) continue;
      for (const person of this.step.value) {
        if (!isNew(person, people.values())) continue;
        const id = this.chosen ? 0 : this.who(person, lost);
        lost.delete(id);
        people.set(id, person);
      }
      this.missed.forEach(id => lost.delete(id));
      Object.assign(this, {missed: this.sought.filter(id => lost.has(id)), search: null});
    }
    Object.assign(this, {people, lost, since: this.since + 1});
    return people;
  }

  /** The id of the lost person whose box is most alike, if one is that of this person, or a new id. */
  who(person, lost) {
    const overlap = id => shared(boxOfJoints(person), boxOfJoints(lost.get(id)))[0];
    const alike = [...lost.keys()].filter(id => !isNew(person, [lost.get(id)]));
    return alike.length ? alike.reduce((best, id) => overlap(id) > overlap(best) ? id : best) : this.ids++;
  }
}

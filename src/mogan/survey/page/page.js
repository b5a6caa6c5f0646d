"use strict";
// One rater's visit. The server keeps everything that counts; this page keeps at most one unsent vote (localStorage).

const $ = (id) => document.getElementById(id);
const sides = ["left", "tie", "right"];
const videos = [$("left"), $("right")];
const narrow = matchMedia("(max-width: 700px) and (orientation: portrait)");
const memory = {  // private windows may refuse storage; the visit works without it
  get(key) { try { return localStorage.getItem(key); } catch { return null; } },
  set(key, value) { try { localStorage.setItem(key, value); } catch { /* nothing to do */ } },
  drop(key) { try { localStorage.removeItem(key); } catch { /* nothing to do */ } },
};

let token = "";
let visit = null;     // {questions, screens, done, code?}
let question = 0;
let answers = {};
let watch = {};
let seen = false;     // both clips played to their end once
let ended = 0;
let loading = 0;      // which load the running handlers belong to
let opened = 0;
let askedAt = 0;
let busy = false;     // a vote is on its way
let halfSpeed = false;

// ---- talking to the server -------------------------------------------------------------------------------------

async function call(method, path, body) {
  const headers = token ? { Authorization: "Bearer " + token } : {};
  if (body) headers["Content-Type"] = "application/json";
  const stop = new AbortController();
  const timer = setTimeout(() => stop.abort(), 20000);
  try {
    const reply = await fetch(path, { method, headers, body: body && JSON.stringify(body), signal: stop.signal, cache: "no-store" });
    let content = {};
    try { content = await reply.json(); } catch { /* an empty or foreign answer is told by its status */ }
    return { status: reply.status, content, wait: Number(reply.headers.get("Retry-After")) || 0 };
  } catch {
    return { status: 0, content: {}, wait: 0 };
  } finally {
    clearTimeout(timer);
  }
}

async function insist(method, path, body, saying) {
  // Again and again until the server has decided: yes (2xx) or no (4xx).
  for (let attempt = 0; ; attempt++) {
    const reply = await call(method, path, body);
    if (reply.status && reply.status < 500 && reply.status !== 429 && reply.status !== 408) { tell(""); return reply; }
    const wait = Math.max(reply.wait, Math.min(30, 1 + attempt * 2)) + Math.random();
    for (let left = Math.ceil(wait); left > 0; left--) {
      tell(saying + " Trying again in " + left + " s.");
      await new Promise((resolve) => setTimeout(resolve, 1000));
    }
  }
}

function tell(text) {
  $("notice").textContent = text;
  $("notice").hidden = !text;
}

function show(view) {
  for (const id of ["welcome", "trial", "end"]) $(id).hidden = id !== view;
  scrollTo(0, 0);
}

// ---- arriving --------------------------------------------------------------------------------------------------

async function arrive() {
  token = decodeURIComponent(location.hash.slice(1));
  const { content: survey } = await insist("GET", "/api/survey", null, "The study cannot be reached.");
  document.title = survey.title;
  document.querySelector("[data-title]").textContent = survey.title;
  $("intro").textContent = survey.intro;
  for (const q of survey.questions) {
    const term = document.createElement("dt"), text = document.createElement("dd");
    term.textContent = q.title;
    text.textContent = q.hint;
    $("definitions").append(term, text);
  }
  if (token) return resume();
  show("welcome");
}

async function resume() {
  const reply = await insist("GET", "/api/visit", null, "The study cannot be reached.");
  if (reply.status !== 200) {
    token = "";
    tell(reply.content.error || "This link does not work.");
    return show("welcome");
  }
  visit = reply.content;
  await sendUnsent();
  next();
}

const platformNames = ["PROLIFIC_PID", "STUDY_ID", "SESSION_ID", "workerId", "assignmentId", "hitId"];

async function start() {
  if (busy || !$("consent").checked) return;
  busy = true;
  const given = new URLSearchParams(location.search);
  const platform = {};
  for (const name of platformNames) if (given.get(name)) platform[name] = given.get(name);
  const reply = await insist("POST", "/api/visit", { consent: true, platform, device: await device() }, "The study cannot be reached.");
  busy = false;
  if (reply.status !== 200) return tell(reply.content.error || "The study could not be started.");
  visit = reply.content;
  token = visit.token;
  history.replaceState(null, "", "/#" + token);
  await sendUnsent();
  next();
}

async function device() {
  const frames = await new Promise((resolve) => {
    let count = 0, begun = 0;
    const tick = (now) => {
      if (!begun) begun = now;
      if (now - begun > 400) return resolve(count / (now - begun) * 1000);
      count++;
      requestAnimationFrame(tick);
    };
    requestAnimationFrame(tick);
    setTimeout(() => resolve(0), 1500);
  });
  const fit = (value, top) => Math.max(0, Math.min(top, Math.round(value * 100) / 100 || 0));
  return {
    screen_width: fit(screen.width, 20000), screen_height: fit(screen.height, 20000),
    window_width: fit(innerWidth, 20000), window_height: fit(innerHeight, 20000),
    pixel_ratio: fit(devicePixelRatio, 20), refresh_hz: fit(frames, 1000),
    colour_bits: fit(screen.colorDepth, 64), touch: matchMedia("(hover: none)").matches ? 1 : 0,
  };
}

// ---- the player ------------------------------------------------------------------------------------------------

function load() {
  const screen = visit.screens[visit.done];
  const mine = ++loading;
  seen = false;
  halfSpeed = false;
  for (const [k, side] of ["left", "right"].entries()) {
    const video = videos[k];
    video.style.aspectRatio = screen.width + " / " + screen.height;
    video.preload = "auto";
    video.src = screen[side];
    video.load();
  }
  const ready = (video) => new Promise((resolve, reject) => {
    if (video.readyState >= 4) return resolve();
    video.addEventListener("canplaythrough", resolve, { once: true });
    video.addEventListener("error", reject, { once: true });
    setTimeout(() => (video.readyState >= 3 ? resolve() : reject()), 30000);
  });
  Promise.all(videos.map(ready)).then(() => mine === loading && restart(), () => {
    if (mine !== loading) return;
    tell("The clips could not be loaded. Trying again.");
    setTimeout(() => { if (mine === loading) { tell(""); load(); } }, 4000);
  });
  paint();
}

async function restart() {
  const mine = loading;
  for (const video of videos) video.pause();
  await Promise.all(videos.map((video) => new Promise((resolve) => {
    if (video.currentTime === 0 && !video.seeking) return resolve();
    video.addEventListener("seeked", resolve, { once: true });
    video.currentTime = 0;
    setTimeout(resolve, 1000);
  })));
  if (mine === loading) await play();
}

async function play() {
  if (document.hidden || $("link").open) return paint();  // nobody sees them; whoever comes back plays them
  ended = 0;
  for (const video of videos) {
    video.playbackRate = halfSpeed ? 0.5 : 1;
    if (video.ended) ended++;
  }
  if (ended === videos.length) return restart();
  try {
    await Promise.all(videos.filter((video) => !video.ended).map((video) => video.play()));
    $("go").hidden = true;
    count("plays");
    preload();
  } catch (error) {  // the browser wants a touch first
    if (error && error.name === "NotAllowedError") $("go").hidden = false;
  }
  paint();
}

function pause() {
  for (const video of videos) video.pause();
  paint();
}

function playing() {
  return videos.some((video) => !video.paused && !video.ended);
}

function finished() {
  ended++;
  if (ended < videos.length) return;
  if (!seen) {
    seen = true;
    watch.locked_ms = Math.round(performance.now() - opened);
    askedAt = performance.now() - 1000;
  }
  restart();
  paint();
}

function step(direction) {
  if (!seen) return;
  pause();
  const fps = visit.screens[visit.done].fps;
  // From the farther one, for both: while they played they may have drifted apart.
  const frame = Math.round(Math.max(...videos.map((video) => video.currentTime)) * fps - 0.5) + direction;
  for (const video of videos) {
    const last = Math.max(0, Math.floor(video.duration * fps + 0.01) - 1);
    video.currentTime = (Math.max(0, Math.min(last, frame)) + 0.5) / fps;
  }
  count("steps");
}

function preload() {
  const screen = visit.screens[visit.done + 1];
  if (!screen || screen.warm) return;
  screen.warm = true;
  for (const side of ["left", "right"]) fetch(screen[side]).then((reply) => reply.blob()).catch(() => {});
}

const controls = {
  play: () => (playing() ? (count("pauses"), pause()) : play()),
  replay: () => { count("replays"); restart(); },
  half: () => {
    halfSpeed = !halfSpeed;
    if (halfSpeed) count("half_speed");
    for (const video of videos) video.playbackRate = halfSpeed ? 0.5 : 1;
    paint();
  },
  back: () => step(-1),
  forward: () => step(1),
};

function count(what) {
  watch[what]++;
}

// ---- asking ----------------------------------------------------------------------------------------------------

function next() {
  if (visit.code) return finish();
  question = 0;
  answers = {};
  watch = { total_ms: 0, locked_ms: 0, plays: 0, replays: 0, pauses: 0, half_speed: 0, steps: 0, hidden: 0, changed: 0 };
  opened = performance.now();
  $("lesson").hidden = true;
  $("asking").hidden = false;
  show("trial");
  load();
}

function paint() {
  if (!visit || visit.code) return;
  const screen = visit.screens[visit.done], q = visit.questions[question];
  const practice = visit.screens.filter((one) => one.practice).length;
  $("where").textContent = screen.practice
    ? "Practice " + (visit.done + 1) + " of " + practice
    : "Pair " + (visit.done + 1 - practice) + " of " + (visit.screens.length - practice);
  $("progress").value = visit.done / visit.screens.length;
  $("which").textContent = "Question " + (question + 1) + " of " + visit.questions.length + " · " + q.title;
  $("ask").textContent = q.ask;
  $("hint").textContent = q.hint;
  $("hint").hidden = q.shows_prompt;
  $("prompt").hidden = !q.shows_prompt;
  $("prompt").textContent = screen.prompt;
  $("status").textContent = busy ? "Saving…" : seen ? "" : "Watch both clips to the end first.";
  $("previous").hidden = question === 0 || busy;
  for (const button of document.querySelectorAll("#answers button")) button.disabled = !seen || busy;
  $("play").querySelector(".label").textContent = playing() ? "Pause" : "Play";
  $("half").setAttribute("aria-pressed", String(halfSpeed));
  $("back").disabled = $("forward").disabled = !seen;
}

function answer(side) {
  // A double click must not answer the question that just appeared.
  if (!seen || busy || performance.now() - askedAt < 350 || !$("lesson").hidden) return;
  answers[visit.questions[question].id] = side;
  askedAt = performance.now();
  if (question + 1 < visit.questions.length) {
    question++;
    return paint();
  }
  watch.total_ms = Math.round(performance.now() - opened);
  if (visit.screens[visit.done].practice) return teach();
  send();
}

function previous() {
  if (question === 0 || busy || !$("lesson").hidden) return;
  question--;
  count("changed");
  askedAt = performance.now();
  paint();
}

function word(side) {
  const words = narrow.matches ? ["Top", "About the same", "Bottom"] : ["Left", "About the same", "Right"];
  return words[sides.indexOf(side)];
}

function teach() {
  const screen = visit.screens[visit.done];
  const missed = visit.questions.filter((q) => screen.expect[q.id] && screen.expect[q.id] !== answers[q.id]);
  $("verdict").textContent = missed.length ? "Have another look" : "Well seen";
  const told = visit.questions.filter((q) => screen.expect[q.id]).map((q) => q.title + ": " + word(screen.expect[q.id]).toLowerCase());
  $("told").textContent = screen.lesson + " Expected here: " + told.join("; ") + ".";
  $("asking").hidden = true;
  $("lesson").hidden = false;
  $("lesson").focus();
}

async function send() {
  if (busy) return;
  busy = true;
  paint();
  // A page may lie open for days: the server takes counts up to a limit (guard.WATCH).
  for (const name of Object.keys(watch)) watch[name] = Math.min(watch[name], name.endsWith("_ms") ? 86400000 : 10000);
  const vote = { slot: visit.done, answers, watch };
  memory.set("unsent", JSON.stringify({ token, vote }));
  await deliver(vote);
  busy = false;
  next();
}

async function deliver(vote) {
  const reply = await insist("POST", "/api/vote", vote, "Your answer is kept on this device, but could not be saved yet.");
  memory.drop("unsent");
  if (reply.status === 200) {
    visit.done = reply.content.done;
    visit.code = reply.content.code;
    visit.back = reply.content.back;
    return;
  }
  // Refused: somebody answered from another window, or the page is out of step. The server knows best.
  const again = await insist("GET", "/api/visit", null, "The study cannot be reached.");
  if (again.status === 200) visit = again.content;
  tell((again.status === 200 ? reply : again).content.error || "Please open your link again.");
}

async function sendUnsent() {
  let kept = null;
  try { kept = JSON.parse(memory.get("unsent") || "null"); } catch { /* damaged: forget it */ }
  memory.drop("unsent");
  if (kept && kept.token === visit.token && kept.vote && kept.vote.slot === visit.done && !visit.code) {
    memory.set("unsent", JSON.stringify(kept));
    await deliver(kept.vote);
  }
}

function finish() {
  loading++;
  for (const video of videos) { video.pause(); video.removeAttribute("src"); video.load(); }
  $("code").textContent = visit.code;
  $("return").hidden = !visit.back;
  if (visit.back) $("back-link").href = visit.back;
  show("end");
}

// ---- hands -----------------------------------------------------------------------------------------------------

function copy(from, button) {
  const done = () => { button.textContent = "Copied"; };
  if (navigator.clipboard) return navigator.clipboard.writeText(from.value ?? from.textContent).then(done, () => {});
  // Plain http, within a network of one's own: the page may copy only what is selected.
  if (from.select) from.select();
  else getSelection().selectAllChildren(from);
  if (document.execCommand("copy")) done();
}

for (const [id, act] of Object.entries(controls)) $(id).addEventListener("click", act);
for (const button of document.querySelectorAll("#answers button")) button.addEventListener("click", () => answer(button.dataset.side));
for (const video of videos) video.addEventListener("ended", finished);
for (const event of ["play", "pause"]) for (const video of videos) video.addEventListener(event, paint);
$("go").addEventListener("click", restart);
$("previous").addEventListener("click", previous);
$("continue").addEventListener("click", send);
$("start").addEventListener("click", start);
$("consent").addEventListener("change", () => { $("start").disabled = !$("consent").checked; });
$("copy").addEventListener("click", () => copy($("code"), $("copy")));
$("copy-link").addEventListener("click", () => { $("address").select(); copy($("address"), $("copy-link")); });
$("close").addEventListener("click", () => $("link").close());
$("link").addEventListener("close", () => { if (!$("trial").hidden) play(); });
$("later").addEventListener("click", () => {
  pause();
  $("address").value = location.href;
  $("link").showModal();
});
document.addEventListener("click", (event) => {  // after a mouse click, Space belongs to the player again
  const button = event.target.closest("button");
  if (button && event.detail > 0) button.blur();
});
document.addEventListener("visibilitychange", () => {
  if (!visit || visit.code) return;
  if (document.hidden) { count("hidden"); pause(); } else if (!$("trial").hidden && !$("link").open) play();
});
addEventListener("hashchange", () => location.reload());

const keys = {
  1: () => answer("left"), 2: () => answer("tie"), 3: () => answer("right"),
  ArrowLeft: () => narrow.matches || answer("left"), ArrowDown: () => narrow.matches || answer("tie"),
  ArrowRight: () => narrow.matches || answer("right"),
  r: controls.replay, h: controls.half, ",": controls.back, ".": controls.forward, b: previous, Backspace: previous,
};
document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey || $("link").open) return;
  const onButton = event.target instanceof HTMLButtonElement;
  if (!$("welcome").hidden) {
    if (event.key === "Enter" && !onButton) { $("consent").checked ? start() : $("consent").focus(); event.preventDefault(); }
    return;
  }
  if ($("trial").hidden) return;
  if (!$("lesson").hidden && event.key === "Enter" && !onButton) { event.preventDefault(); return send(); }
  if (event.key === " " && !onButton) { event.preventDefault(); return event.repeat || controls.play(); }
  const act = keys[event.key.length === 1 ? event.key.toLowerCase() : event.key];
  const long = ["ArrowUp", "ArrowDown"].includes(event.key) && event.target.closest("#prompt");
  const scrolls = long && long.scrollHeight > long.clientHeight;  // a prompt, to be read to its end
  if (!act || scrolls) return;
  const stepping = event.key === "," || event.key === ".";
  if (event.repeat && !stepping) return;
  if (!(narrow.matches && event.key.startsWith("Arrow"))) event.preventDefault();
  act();
});

setInterval(() => {
  const longest = videos[0].duration >= videos[1].duration ? videos[0] : videos[1];
  $("time").value = longest.duration ? longest.currentTime / longest.duration : 0;
}, 60);

arrive();

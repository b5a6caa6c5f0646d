"use strict";
// Asks for a piece when less than one is left to show, so that a tab that is paused, hidden or closed asks for nothing and nothing is made.

const $ = (id) => document.getElementById(id);
const film = $("film").getContext("2d"), veil = $("flow").getContext("2d");
let model = null;     // what /api/model says
let state = null;     // that is asked for: one of model.states, "auto" is what a script or a recording says
let stream = null;    // {id, seed, texts: by number, states, next: number of the piece to ask for, begun: when}
let frames = [];      // to be shown: {pixels, flow, change, state, piece}
let shown = [];       // times of the latest ones
let playing = true, speed = 1, flowing = false;
let asking = false, due = 0, could = Infinity, firstFrame = null, now = -1, nowState = null;

// ---- talking to the server -------------------------------------------------------------------------------------

async function call(path, body) {
  const options = body && { method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(body) };
  for (let lost = false; ; lost = true) {
    try {
      const reply = await fetch(path, { ...options, cache: "no-store" });
      if (lost) { tell(""); reply.lost = true; }
      return reply;
    } catch {
      tell("The server does not answer. Start mogan stream again; this page tries every 2 seconds.");
      await new Promise((resolve) => setTimeout(resolve, 2000));
    }
  }
}

async function sentence(reply) {
  try { return (await reply.json()).error || "The server answered " + reply.status + "."; } catch { return "The server answered " + reply.status + "."; }
}

function tell(text, action, label) {
  $("notice").textContent = text;
  $("notice").hidden = !text;
  if (action) $("notice").append(button(label, () => { tell(""); action(); }));
}

// ---- streams ---------------------------------------------------------------------------------------------------

async function begin(prompt, seed) {
  const begun = performance.now();
  stream = null; frames = []; shown = []; now = -1; due = 0; could = Infinity; firstFrame = null;
  tell("");
  say("Making the first frame …");
  $("save").disabled = true;
  const reply = await call("/api/stream", { prompt, state, seed });
  if (!reply.ok) { note(await sentence(reply)); say(""); return; }
  const told = await reply.json();
  frames = [];  // of two that were begun at once the one the server answers last plays
  stream = { id: told.stream, seed, texts: [prompt], states: [state], next: 0, begun };
  note(told.notes.join(" "));
  pause(false);
}

async function change(prompt) {
  if (!stream) return begin(prompt, model.seed);
  const mine = stream, reply = await call("/api/prompt", { stream: mine.id, prompt, state });
  if (!reply.ok) return reply.status === 409 ? begin(prompt, mine.seed) : note(await sentence(reply));
  const told = await reply.json();
  mine.texts[told.change] = prompt;
  mine.states[told.change] = state;
  note(told.notes.join(" "));
  pause(false);
  title();
}

async function fill() {
  if (asking || !stream || !playing || frames.length > 4) return;
  asking = true;
  const mine = stream, flow = flowing;
  try {
    const reply = await call("/api/next", { stream: mine.id, number: mine.next, flow });
    if (mine !== stream) return;
    if (reply.status === 204) {
      if (!frames.length) say("Making frames … " + Math.round((performance.now() - (due || mine.begun)) / 1000) + " s");
    } else if (reply.ok) {
      const pixels = new Uint8ClampedArray(await reply.arrayBuffer());
      if (mine === stream) take(JSON.parse(reply.headers.get("x-piece")), pixels, mine);
    } else {
      stream = null;
      $("save").disabled = true;  // it went with the stream
      const why = await sentence(reply), again = () => begin(mine.texts[mine.texts.length - 1], mine.seed);
      if (reply.lost) return again();  // the server was started anew
      tell(why, again, "Play again");
      say("");
    }
  } finally { asking = false; }
}

function take(told, pixels, mine) {
  const size = model.width * model.height * 4, flows = pixels.length > told.frames * size;
  const picture = (i) => new ImageData(pixels.subarray(i * size, (i + 1) * size), model.width, model.height);
  for (let i = 0; i < told.frames; i++)
    frames.push({ pixels: picture(i), flow: flows ? picture(told.frames + i) : null, change: told.change, state: told.state, piece: mine.next });
  mine.next++;
  could = 1 / Math.max(told.make, told.decode);
}

// ---- showing ---------------------------------------------------------------------------------------------------

function show(time) {
  requestAnimationFrame(show);
  fill();
  if (!playing || !stream) return;
  if (!frames.length || time < due) return;
  const step = 1000 / Math.min(model.fps * speed, could);
  due = Math.max(due, time - step) + step;
  const frame = frames.shift();
  film.putImageData(frame.pixels, 0, 0);
  if (frame.flow) veil.putImageData(frame.flow, 0, 0); else veil.clearRect(0, 0, model.width, model.height);
  if (firstFrame === null) { firstFrame = performance.now() - stream.begun; $("save").disabled = false; }
  shown.push(time);
  say("");
  if (frame.change !== now || frame.state !== nowState) { now = frame.change; nowState = frame.state; title(); }
  sessionStorage.setItem("stream", JSON.stringify({ ...stream, next: frame.piece }));
}

function numbers() {
  const time = performance.now();
  shown = shown.filter((then) => time - then < 2000);
  if (firstFrame === null) { $("numbers").textContent = ""; return; }
  const rate = shown.length > 1 ? (shown.length - 1) * 1000 / (shown[shown.length - 1] - shown[0]) : 0;
  $("numbers").textContent = "first frame after " + (firstFrame / 1000).toFixed(2) + " s · " + (playing ? rate.toFixed(1) : "0") +
    " frames a second · " + Math.round(could) + " possible";
}

function title() {
  if (!stream) return;
  const last = stream.texts.length - 1;
  const named = (number, told) => [stream.texts[number], told || stream.states[number]].filter(Boolean).join(" · ");
  $("now").textContent = named(Math.max(now, 0), nowState);
  if (last > Math.max(now, 0)) {
    const next = document.createElement("small");
    next.textContent = " → " + named(last);
    $("now").append(next);
  }
}

function say(text) { $("wait").textContent = text; $("wait").hidden = !text; }
function note(text) { $("note").textContent = text; }

// ---- buttons ---------------------------------------------------------------------------------------------------

function button(text, action, colour) {
  const made = document.createElement("button");
  made.type = "button";
  if (colour) { const dot = document.createElement("i"); dot.style.background = colour; made.append(dot); }
  made.append(text);
  made.onclick = action;
  return made;
}

function pause(yes) {
  playing = !yes;
  due = performance.now();
  $("play").setAttribute("aria-pressed", yes);
  $("play").firstElementChild.textContent = yes ? "Play" : "Pause";
  numbers();
}

function see() {
  flowing = !flowing;
  $("see").setAttribute("aria-pressed", flowing);
  $("flow").hidden = !flowing;
}

function another() {
  if (stream) begin(stream.texts[stream.texts.length - 1], stream.seed + 1);
}

async function save() {
  $("save").disabled = true;
  $("save").textContent = "Saving …";
  const mine = stream, reply = await call("/api/clip", { stream: mine.id });
  if (reply.ok) {
    const link = document.createElement("a");
    link.href = URL.createObjectURL(await reply.blob());
    link.download = mine.texts[Math.max(now, 0)].replace(/[^\p{L}\p{N} ,.-]/gu, "_").slice(0, 80) + "-" + mine.seed + ".mp4";
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 10000);
  } else { note(await sentence(reply)); }
  $("save").textContent = "Save mp4";
  $("save").disabled = !stream || firstFrame === null;  // another may have begun meanwhile, or none be left
}

// ---- the lab's world -------------------------------------------------------------------------------------------

function press() {
  // Which buttons the text in the box stands for; none for any other text.
  if (!model.lab) return;
  const text = $("prompt").value.trim();
  let chosen = null;
  for (const colour of Object.keys(model.lab.colours)) for (const shape of model.lab.shapes) for (const manner of Object.keys(model.lab.manners))
    if (compose({ colour, shape, manner }) === text) chosen = { colour, shape, manner };
  for (const one of document.querySelectorAll("#lab button")) one.setAttribute("aria-pressed", !!chosen && chosen[one.dataset.kind] === one.dataset.name);
  if (chosen) press.chosen = chosen;
}

function takeUp(name) {
  state = name;
  for (const one of $("states").children) one.setAttribute("aria-pressed", one.dataset.name === name);
}

function compose({ colour, shape, manner }) { return model.lab.manners[manner].replace("{}", "a " + colour + " " + shape); }

function furnish(place, kind, names) {
  for (const name of names) {
    const rgb = kind === "colour" && "rgb(" + model.lab.colours[name].join(",") + ")";
    const made = button(name, () => {
      $("prompt").value = compose({ ...press.chosen, [kind]: name });
      press();
      change($("prompt").value);
    }, rgb);
    made.dataset.kind = kind; made.dataset.name = name;
    $(place).append(made);
  }
}

// ---- arriving --------------------------------------------------------------------------------------------------

async function arrive() {
  const begun = performance.now();
  model = await (await call("/api/model")).json();
  document.title = model.name + " · mogan stream";
  for (const canvas of [$("film"), $("flow")]) {
    canvas.width = model.width; canvas.height = model.height;
    canvas.classList.toggle("small", model.width < 256);
  }
  $("stage").style.aspectRatio = model.width + " / " + model.height;
  $("stage").style.setProperty("--ratio", model.width / model.height);
  $("about").textContent = model.name + ": " + model.steps + " steps a frame, " + model.width + " × " + model.height + " at " + model.fps +
    " frames a second. One page plays at a time. A save holds the last " + model.kept + " seconds.";
  if (model.states.length) {
    $("state").hidden = false;
    for (const name of model.states) {
      const made = button(name, () => { takeUp(name); change(stream ? stream.texts[stream.texts.length - 1] : $("prompt").value.trim()); });
      made.dataset.name = name;
      $("states").append(made);
    }
    takeUp(model.states[0]);
  }
  if (model.lab) {
    $("lab").hidden = false;
    const manners = Object.keys(model.lab.manners);
    $("motion").hidden = manners.length === 1;
    press.chosen = { colour: Object.keys(model.lab.colours)[0], shape: model.lab.shapes[0], manner: manners.length === 1 ? manners[0] : "bouncing" };
    furnish("manners", "manner", Object.keys(model.lab.manners));
    furnish("colours", "colour", Object.keys(model.lab.colours));
    furnish("shapes", "shape", model.lab.shapes);
  }
  $("prompt").value = model.prompt;
  press();
  const before = JSON.parse(sessionStorage.getItem("stream") || "null");  // this tab was reloaded
  if (before && before.states && (await call("/api/next", { stream: before.id, number: before.next, flow: false })).ok) {
    stream = { ...before, begun };
    $("prompt").value = before.texts[before.texts.length - 1];
    takeUp(before.states[before.states.length - 1]);
    press();
  } else if (model.prompt) { await begin(model.prompt, model.seed); } else { say("Say what it shows"); $("prompt").focus(); }
  if (stream) stream.begun = begun;
  requestAnimationFrame(show);
  setInterval(numbers, 500);
}

$("ask").onsubmit = (event) => { event.preventDefault(); const text = $("prompt").value.trim(); if (text) change(text); };
$("prompt").oninput = () => press();
$("play").onclick = () => pause(playing);
$("see").onclick = see;
$("again").onclick = another;
$("save").onclick = save;
for (const one of document.querySelectorAll("[data-speed]")) one.onclick = () => {
  speed = Number(one.dataset.speed);
  for (const other of document.querySelectorAll("[data-speed]")) other.setAttribute("aria-pressed", other === one);
};
document.onkeydown = (event) => {
  const own = event.key === " " ? "input, button" : "input";  // a button that was clicked keeps the focus, and takes only the space bar
  if (event.target.matches(own) || event.ctrlKey || event.metaKey || event.altKey) return;
  const action = { " ": () => pause(playing), f: see, n: another }[event.key.toLowerCase()];
  if (action) { event.preventDefault(); action(); }
};
arrive();

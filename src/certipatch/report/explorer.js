"use strict";
// The explorer and the gallery of a certipatch report. Margins come from Python; only sums outside the patch are added here.
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const $ = (id) => document.getElementById(id);
  const bytes = (text) => Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));
  const numbers = (Type, text) => new Type(bytes(text).buffer);
  const bit = (packed, at) => (packed[at >> 3] >> (7 - (at & 7))) & 1;
  const STATES = ["certified", "open", "wrong", "alarm"];
  const own = data.titles.length > 0 && numbers(Int32Array, data.target).every((target) => target < 0);
  const BADGES = { certified: "✓ certified", open: own ? "○ not certified" : "○ right, not certified", wrong: "✕ wrong",
    alarm: "! false alarm" };
  const label = numbers(Int32Array, data.label), target = numbers(Int32Array, data.target);
  const state = Array.from(bytes(data.state), (number) => STATES[number]), safe = bytes(data.safe);
  const smallest = numbers(Float64Array, data.margin), largest = numbers(Int32Array, data.largest);
  const [H, W] = data.size;

  function make(tag, className = "", text = "", parent = null) {
    const element = document.createElement(tag);
    element.className = className;
    element.textContent = text;
    if (parent) parent.append(element);
    return element;
  }
  function draw(tag, attributes, parent) {
    const element = document.createElementNS(parent.namespaceURI, tag);
    for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
    parent.append(element);
    return element;
  }
  function size(value) {
    if (Math.abs(value) === Infinity) return "∞";
    return Number.isInteger(value) ? Math.abs(value).toLocaleString("en") : String(+Math.abs(value).toPrecision(3));
  }
  function signed(value) {
    if (value !== 0 && Math.abs(value) < 1e-6) return value > 0 ? "just above 0" : "just below 0";
    return (value > 0 ? "+" : value < 0 ? "−" : "") + size(value);
  }
  const plainly = (value) => (value < 0 ? "−" : "") + size(value);
  const plural = (count, word) => `${count.toLocaleString("en")} ${word}${count === 1 ? "" : "s"}`;

  // ---- pictures: tiles of a few sheets
  const sheets = data.sheets.map((sheet) => Object.fromEntries(["pictures", "maps"].map((kind) => {
    const image = sheet[kind] ? new Image() : null;
    if (image) {
      image.ready = new Promise((done, failed) => { [image.onload, image.onerror] = [done, failed]; });
      image.src = sheet[kind];
    }
    return [kind, image];
  })));
  const mapped = sheets.every((sheet) => sheet.maps);
  function paint(canvas, kind, i) {
    const image = sheets[Math.floor(i / data.per)][kind], at = i % data.per;
    [canvas.height, canvas.width] = data.tile;
    const left = (at % data.columns) * data.pitch[1], top = Math.floor(at / data.columns) * data.pitch[0];
    canvas.getContext("2d").drawImage(image, left, top, canvas.width, canvas.height, 0, 0, canvas.width, canvas.height);
  }

  // ---- gallery
  const explorer = data.explorer, inExplorer = new Int32Array(data.titles.length).fill(-1);
  if (explorer) numbers(Int32Array, explorer.index).forEach((i, at) => { inExplorer[i] = at; });
  let listed = [], visible = 60;

  function choose() {
    const wanted = document.querySelector("input[name=outcome]:checked").value, order = $("order").value;
    listed = data.titles.map((_, i) => i).filter((i) => wanted === "all" || state[i] === wanted);
    const rank = { strong: (i) => -smallest[i], weak: (i) => smallest[i], close: (i) => Math.abs(smallest[i]), data: () => 0 }[order];
    listed.sort((i, j) => Math.sign(rank(i) - rank(j)) || i - j);
    visible = 60;
    fill(true);
  }
  function fill(fresh) {
    const gallery = $("thumbs");
    if (fresh) gallery.replaceChildren();
    for (const i of listed.slice(gallery.children.length, visible)) gallery.append(thumb(i));
    $("more").hidden = visible >= listed.length;
    $("count").textContent = listed.length ? `${plural(Math.min(visible, listed.length), "picture")} of ${listed.length.toLocaleString("en")}` :
      "No picture has this outcome.";
    if (explorer) status();
  }
  function thumb(i) {
    const item = make("li"), button = make("button", `thumb ${state[i]}`, "", item);
    button.type = "button";
    button.dataset.i = i;
    button.disabled = inExplorer[i] < 0;
    const pair = make("span", "pair", "", button);
    for (const kind of mapped ? ["pictures", "maps"] : ["pictures"]) paint(make("canvas", "", "", pair), kind, i);
    const name = data.names[label[i]], truth = target[i] >= 0 && target[i] !== label[i] ? `, truth ${data.names[target[i]]}` : "";
    make("span", "name", (own ? `${data.titles[i]}: ` : "") + name + truth, button);
    const line = make("span", "top", "", button);
    make("span", "badge", BADGES[state[i]], line);
    make("span", "figure", signed(smallest[i]), line);
    button.title = data.titles[i];
    button.setAttribute("aria-label", `${data.titles[i]}: answer ${name}${truth}; ${BADGES[state[i]].slice(2)}; smallest margin ` +
      `${signed(smallest[i])}${button.disabled ? "" : "; open in the explorer"}`);
    button.addEventListener("click", () => {
      show(i);
      const still = matchMedia("(prefers-reduced-motion: reduce)").matches;
      $("explorer").scrollIntoView({ behavior: still ? "auto" : "smooth" });
      $("stage").focus({ preventScroll: true });
    });
    return item;
  }
  function gallery() {
    const counts = { all: state.length };
    for (const one of state) counts[one] = (counts[one] || 0) + 1;
    for (const input of document.querySelectorAll("input[name=outcome]")) {
      input.nextElementSibling.querySelector("b").textContent = (counts[input.value] || 0).toLocaleString("en");
      input.addEventListener("change", choose);
    }
    $("order").addEventListener("change", choose);
    $("more").addEventListener("click", () => {
      const next = $("thumbs").children.length;
      visible += 120;
      fill(false);
      const button = $("thumbs").children[next]?.firstChild;
      if (button && !button.disabled) button.focus({ preventScroll: true });
    });
    $("static").hidden = true;
    $("gallery").hidden = false;
    choose();
  }

  // ---- explorer: which views see the patch, what the others say, and the margin
  let shape, top_, left_, rowOf, sees, margins, votes, scores, kept, unsure, V, K, R, L;
  const quietly = explorer && explorer.notion === "detection" ? " without an alarm" : "";
  let now = { i: 0, l: 0 }, resting = 0, cells = [];

  function unpack() {
    [V, K, R] = [explorer.views, explorer.classes, explorer.rows];
    shape = numbers(Uint16Array, explorer.shape);
    top_ = numbers(Uint16Array, explorer.top);
    left_ = numbers(Uint16Array, explorer.left);
    rowOf = numbers(Int32Array, explorer.rowOf);
    L = rowOf.length;
    sees = bytes(explorer.sees);
    margins = numbers(explorer.whole ? Int16Array : Float32Array, explorer.margins);
    if (explorer.kind === "votes") votes = bytes(explorer.votes);
    else [scores, kept] = [numbers(Float32Array, explorer.scores), numbers(Int32Array, explorer.kept)];
    unsure = explorer.unsure ? bytes(explorer.unsure) : null;
  }
  const margin = (at, l) => margins[at * R + rowOf[l]];
  const classesOf = (at) => (votes ? Array.from({ length: K }, (_, k) => k) : Array.from(kept.slice(at * explorer.scored, (at + 1) * explorer.scored)));
  function evidence(at, v, c) {
    if (votes) return bit(votes.subarray(at * Math.ceil((V * K) / 8)), v * K + c);
    return scores[(at * V + v) * explorer.scored + c];
  }
  function attacked(at, l) {
    const row = sees.subarray(rowOf[l] * Math.ceil(V / 8)), off = unsure ? unsure.subarray(at * Math.ceil(V / 8)) : null;
    return Array.from({ length: V }, (_, v) => Boolean(bit(row, v) || (off && bit(off, v))));
  }
  // What the views outside the patch give to every embedded class: {classes, outside, inside}, and which views are attacked.
  function sums(at, l) {
    const classes = classesOf(at), hit = attacked(at, l);
    const outside = classes.map(() => 0), inside = classes.map(() => 0);
    for (let v = 0; v < V; v++)
      for (let c = 0; c < classes.length; c++) (hit[v] ? inside : outside)[c] += evidence(at, v, c);
    return { classes, hit, outside, inside, touched: hit.filter(Boolean).length };
  }
  function weakest(at) {
    let best = 0;
    for (let l = 1; l < L; l++) if (margin(at, l) < margin(at, best)) best = l;
    return best;
  }

  // Rectangles of a patch: runs of pixels in rows that are alike.
  function patchPath(l) {
    const mask = explorer.masks[shape[l]], boxes = [];
    for (let y = 0, below; y < mask.length; y = below) {
      for (below = y + 1; mask[below] === mask[y];) below++;
      for (const run of mask[y].matchAll(/1+/g))
        boxes.push(`M${left_[l] + run.index} ${top_[l] + y}h${run[0].length}v${below - y}h${-run[0].length}z`);
    }
    return boxes.join("");
  }
  function buildStrip() {
    const strip = $("strip"), { kind, starts, length, rows, columns } = explorer.layout;
    const box = kind === "column" ? [length, 1] : kind === "row" ? [1, length] : [columns, rows];
    strip.setAttribute("viewBox", `0 0 ${box[0]} ${box[1]}`);
    strip.setAttribute("preserveAspectRatio", "none");
    strip.parentElement.classList.add(kind);
    if (rows <= 3) strip.parentElement.style.maxWidth = "none";
    $("stage").style.setProperty("--ratio", W / H);
    strip.style.aspectRatio = kind === "grid" ? `${columns} / ${rows}` : "";
    if (V > 4096) { strip.parentElement.hidden = true; return; }
    cells = Array.from({ length: V }, (_, v) => {
      const end = starts && (v + 1 < V ? starts[v + 1] : length);
      const place = kind === "column" ? { x: starts[v], y: 0, width: end - starts[v], height: 1 } :
        kind === "row" ? { x: 0, y: starts[v], width: 1, height: end - starts[v] } :
        { x: v % columns, y: Math.floor(v / columns), width: 1, height: 1 };
      return draw("rect", place, strip);
    });
  }
  function drawStrip(at, classSums) {
    const classes = classSums.classes, mine = classes.indexOf(label[now.i]);
    let most = 1e-9;
    if (!votes) for (let v = 0; v < V; v++) most = Math.max(most, evidence(at, v, mine));
    cells.forEach((cell, v) => {
      let kind = "none";
      if (votes) {
        if (evidence(at, v, mine)) kind = "mine";
        else if (classes.some((_, c) => evidence(at, v, c))) kind = "other";
      } else kind = "score";
      cell.setAttribute("class", kind + (classSums.hit[v] ? " hit" : ""));
      if (!votes) cell.style.setProperty("--much", Math.max(0.06, evidence(at, v, mine) / most).toFixed(3));
    });
  }

  function drawEvidence(at, classSums) {
    const { classes, outside, touched } = classSums, y = label[now.i], mine = classes.indexOf(y);
    const [lo, hi] = explorer.bounds || [0, 0];
    const gain = classes.map((k) => (k === y || !explorer.bounds ? 0 : touched * hi));
    const least = classes.map((k, c) => outside[c] + (explorer.bounds ? touched * (k === y ? lo : 0) : 0));
    const top = Math.max(1e-9, ...classes.map((_, c) => Math.max(least[c], outside[c] + gain[c], classSums.outside[c] + classSums.inside[c])));
    const bottom = Math.min(0, ...least), base = bottom - (bottom < 0 ? 0.05 * (top - bottom) : 0), end = top - base;
    const order = classes.map((_, c) => c).sort((a, b) => (classes[b] === y) - (classes[a] === y) || outside[b] - outside[a] || classes[a] - classes[b]);
    const rows = order.slice(0, 5);
    const truth = classes.indexOf(target[now.i]);
    if (truth >= 0 && !rows.includes(truth)) rows[4] = truth;
    const body = $("evidence");
    body.replaceChildren();
    for (const c of rows) {
      const row = make("tr", classes[c] === y ? "answer" : "", "", body);
      const name = make("th", "", data.names[classes[c]], row);
      name.scope = "row";
      const tags = [classes[c] === y && "answer", target[now.i] === classes[c] && "true class"].filter(Boolean);
      if (tags.length) make("span", "tag", ` ${tags.join(", ")}`, name);
      const bar = make("div", "meter", "", make("td", "", "", row));
      make("span", "solid", "", bar).style.width = `${(100 * (least[c] - base)) / end}%`;
      if (explorer.bounds && classes[c] !== y)
        make("span", "could", "", bar).style.width = `${(100 * (outside[c] + gain[c] - least[c])) / end}%`;
      const value = votes ? outside[c] : +outside[c].toPrecision(4);
      make("td", "figure", plainly(value) + (gain[c] ? ` + ${size(gain[c])}` : classes[c] === y && touched * lo ? ` − ${size(touched * lo)}` : ""), row);
    }
    const worst = least[mine];
    let rival = -1;
    classes.forEach((k, c) => {
      const reach = outside[c] + gain[c];
      if (k !== y && (rival < 0 || reach > outside[rival] + gain[rival] || (reach === outside[rival] + gain[rival] && k < classes[rival]))) rival = c;
    });
    return { worst, rival, reach: rival < 0 ? 0 : outside[rival] + gain[rival] };
  }
  function because(classSums, most, sure) {
    const answer = data.names[label[now.i]], one = explorer.layout.one;
    const seen = `${classSums.touched.toLocaleString("en")} of ${plural(V, one)} ${classSums.touched === 1 ? "is" : "are"} the attacker’s`;
    if (classSums.touched === 0 && margin(inExplorer[now.i], now.l) > 0) return `No ${one} sees the patch here: it changes nothing.`;
    const why = {
      mask: "The others give the sums above. The attacker can also make the answer lose its strongest region; the margin allows for that.",
      detection: "The margin is the answer’s score where the patch is hidden, less the threshold for an alarm.",
      masks: "What decides is not the sum: the answer must stay behind every two masks, one of which hides the patch. The margin is its smallest lead there.",
      other: "The margin follows from the theorem.",
    };
    if (!explorer.bounds || most.rival < 0) return `${seen}. ${why[explorer.rule] || why.other}`;
    const name = data.names[classSums.classes[most.rival]], digits = (value) => plainly(votes ? value : +value.toPrecision(4));
    const tie = votes && most.worst === most.reach;
    const ends = tie ? (sure ? "A tie goes to the class that comes first, which is the answer." : "A tie goes to the class that comes first, which is the rival.") :
      sure ? "That is not enough to win." : "That may be enough to win.";
    return `${seen}. ${answer} keeps at least ${digits(most.worst)}; ${name} can reach ${digits(most.reach)}. ${ends}`;
  }

  function place(l) {
    now.l = l;
    const at = inExplorer[now.i], value = margin(at, l), sure = value > 0, classSums = sums(at, l);
    const mask = explorer.masks[shape[l]], bottom = top_[l] + mask.length - 1, right = left_[l] + mask[0].length - 1;
    for (const path of $("patch").children) path.setAttribute("d", patchPath(l));
    $("patch").setAttribute("class", sure ? "safe" : "risky");
    drawStrip(at, classSums);
    const most = drawEvidence(at, classSums);
    $("verdict").className = `verdict ${sure ? "certified" : "open"}`;
    $("says").textContent = sure ? `✓ Nothing painted here can change the answer${quietly}` : state[now.i] === "alarm" ?
      "○ The clean picture raises an alarm" : `○ A patch here may change the answer${quietly}`;
    $("margin").textContent = signed(value);
    $("where").textContent = `rows ${top_[l]}–${bottom}, columns ${left_[l]}–${right}`;
    $("touched").textContent = `${classSums.touched.toLocaleString("en")} of ${V.toLocaleString("en")}`;
    $("because").textContent = because(classSums, most, sure);
    $("stage").setAttribute("aria-valuetext", `${$("where").textContent}: ${sure ? "certified" : "not certified"}, margin ${signed(value)}`);
  }
  function status() {
    const open = listed.filter((i) => inExplorer[i] >= 0), at = open.indexOf(now.i);
    $("position").textContent = at < 0 ? "" : `${(at + 1).toLocaleString("en")} of ${open.length.toLocaleString("en")}`;
  }
  function show(i, l = null) {
    if (inExplorer[i] < 0) return;
    const at = inExplorer[i];
    now.i = i;
    paint($("picture"), "pictures", i);
    if (mapped) paint($("overlay"), "maps", i);
    $("name").textContent = data.titles[i];
    $("badge").textContent = BADGES[state[i]];
    $("badge").parentElement.className = `top ${state[i]}`;
    const places = Array.from({ length: L }, (_, place) => margin(at, place) > 0).filter(Boolean).length;
    const facts = [["answer", data.names[label[i]]]];
    if (target[i] >= 0) facts.push(["true class", data.names[target[i]]]);
    facts.push(["certified places", `${places.toLocaleString("en")} of ${L.toLocaleString("en")}`], ["smallest margin", signed(smallest[i])]);
    if (largest[i] >= 0) facts.push(["largest certified square", largest[i] ? `${largest[i]}×${largest[i]} pixels` : "none"]);
    $("facts").replaceChildren();
    for (const [name, value] of facts) {
      const row = make("div", "", "", $("facts"));
      make("dt", "", name, row);
      make("dd", "", value, row);
    }
    if (state[i] === "wrong" && safe[i]) make("p", "small", "No such patch can change this wrong answer.", $("facts"));
    for (const button of document.querySelectorAll(".thumb[aria-current]")) button.removeAttribute("aria-current");
    document.querySelector(`.thumb[data-i="${i}"]`)?.setAttribute("aria-current", "true");
    resting = l ?? weakest(at);
    place(resting);
    status();
  }

  // ---- moving
  function nearest(y, x, kind) {
    let best = now.l, least = Infinity;
    for (let l = 0; l < L; l++) {
      if (shape[l] !== kind) continue;
      const mask = explorer.masks[shape[l]];
      const distance = (top_[l] + mask.length / 2 - y) ** 2 + (left_[l] + mask[0].length / 2 - x) ** 2;
      if (distance < least) [best, least] = [l, distance];
    }
    return best;
  }
  function step(down, across) {
    let best = now.l, least = Infinity;
    for (let l = 0; l < L; l++) {
      const dy = top_[l] - top_[now.l], dx = left_[l] - left_[now.l], ahead = dy * down + dx * across;
      if (shape[l] !== shape[now.l] || ahead <= 0) continue;
      const length = Math.abs(down + across), aside = Math.abs(dy * across) + Math.abs(dx * down);
      const distance = Math.abs(ahead / length - length) + 3 * aside / length;
      if (distance < least) [best, least] = [l, distance];
    }
    return best;
  }
  function turn(forward) {
    const open = listed.filter((i) => inExplorer[i] >= 0), at = open.indexOf(now.i);
    if (open.length) show(open[at < 0 ? 0 : (at + forward + open.length) % open.length]);
  }
  function otherShape() {
    const many = explorer.masks.length, mask = explorer.masks[shape[now.l]];
    rest(nearest(top_[now.l] + mask.length / 2, left_[now.l] + mask[0].length / 2, (shape[now.l] + 1) % many));
  }
  const rest = (l) => { resting = l; place(l); };
  function toggleMap() {
    $("overlay").hidden = !$("see-map").checked;
  }
  function key(event) {
    if (event.altKey || event.ctrlKey || event.metaKey) return;
    const far = event.shiftKey ? 5 : 1;
    const actions = {
      ArrowUp: () => rest(step(-far, 0)), ArrowDown: () => rest(step(far, 0)),
      ArrowLeft: () => rest(step(0, -far)), ArrowRight: () => rest(step(0, far)),
      PageDown: () => turn(1), n: () => turn(1), PageUp: () => turn(-1), p: () => turn(-1),
      Home: () => rest(weakest(inExplorer[now.i])), w: () => rest(weakest(inExplorer[now.i])),
      t: otherShape, m: () => { $("see-map").checked = !$("see-map").checked; toggleMap(); },
    };
    if (!(event.key in actions)) return;
    event.preventDefault();
    actions[event.key]();
  }
  function explore() {
    unpack();
    buildStrip();
    const stage = $("stage"), box = $("patch");
    box.setAttribute("viewBox", `0 0 ${W} ${H}`);
    const under = (event) => {
      const edge = stage.getBoundingClientRect();
      return nearest(((event.clientY - edge.top) / edge.height) * H, ((event.clientX - edge.left) / edge.width) * W, shape[now.l]);
    };
    stage.addEventListener("keydown", key);
    stage.addEventListener("pointerdown", (event) => {
      try { stage.setPointerCapture(event.pointerId); } catch { /* a pointer that is gone already */ }
      rest(under(event));
    });
    stage.addEventListener("pointermove", (event) => {
      if (event.pointerType === "mouse" && !event.buttons) place(under(event));
      else if (event.buttons) rest(under(event));
    });
    stage.addEventListener("pointerleave", () => place(resting));
    $("next").addEventListener("click", () => turn(1));
    $("previous").addEventListener("click", () => turn(-1));
    $("weak").addEventListener("click", () => rest(weakest(inExplorer[now.i])));
    $("turn").hidden = explorer.masks.length < 2;
    $("turn").addEventListener("click", otherShape);
    $("see-map").addEventListener("change", toggleMap);
    $("see-map").parentElement.hidden = !mapped;
    toggleMap();
    for (const button of document.querySelectorAll("[data-move]"))
      button.addEventListener("click", () => rest(step(...button.dataset.move.split(" ").map(Number))));
    $("explorer").hidden = false;
    show(start());
  }
  // The first picture: right, not certified, with about two places of three certified, so that there is something to find.
  function start() {
    let best = 0, least = Infinity;
    inExplorer.forEach((at, i) => {
      if (at < 0) return;
      let sure = 0;
      for (let r = 0; r < R; r++) sure += margins[at * R + r] > 0;
      const distance = Math.abs(sure / R - 0.67) + (state[i] === "open" ? 0 : 1);
      if (distance < least) [best, least] = [i, distance];
    });
    return best;
  }

  Promise.all(sheets.flatMap((sheet) => Object.values(sheet)).filter(Boolean).map((image) => image.ready)).then(() => {
    gallery();
    if (explorer) explore();
    document.documentElement.dataset.ready = "true";
  });
})();

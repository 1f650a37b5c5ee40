package ledger

import (
	"fmt"
	"testing"

	"github.com/lmctl/lmctl/migrate"
)

// The model is one handover between two hosts, "src" and "dst", as the engine
// and the agent drive the ledger, with everything that can go wrong in between:
// an agent dies and comes back, a host restarts with or without its page cache
// having reached the disk, a hypervisor is killed, a connection breaks, a
// message is late or lost. The test walks through every state that can be
// reached with a few such faults and holds each against the invariants, and
// from each it lets everything heal and sees whether the hosts come to an end.

var modelHandover = migrate.Handover{ID: "h", Guest: "g", UUID: "u", Source: "src", Destination: "dst", Epoch: 5}

// note is a Record in comparable form; there is only one handover.
type note struct {
	state State
	epoch uint64
	by    bool
	boot  int8
}

func (n note) record() Record {
	r := Record{State: n.state, Guest: "g", UUID: "u", Epoch: n.epoch, Boot: fmt.Sprint(n.boot)}
	if n.state == None {
		r.UUID = ""
	}
	if n.by {
		h := modelHandover
		r.Handover = &h
	}
	return r
}

func noteOf(r Record) note {
	n := note{state: r.State, epoch: r.Epoch, by: r.Handover != nil}
	if _, err := fmt.Sscan(r.Boot, &n.boot); err != nil && r.State != None {
		panic(err) // the model wrote it
	}
	return n
}

// node is one host. Its engine and its settling are both a plan: a list of
// steps, of which the next is at.
type node struct {
	up   bool
	boot int8
	// What the agent holds in memory, what the file holds in the page cache,
	// and what is on the disk for certain.
	mem, cache, disk note
	copy             Copy
	blind            bool // the agent cannot tell what it has of the guest
	shell            bool
	engine           phase  // the engine's, while it has the say
	plan             Action // being carried out by the agent
	at               int8
	pending          bool // a durable write is between page cache and disk
}

type phase int8

const (
	off        phase = iota
	copying          // source: live passes; destination: shell, not prepared
	suspended        // source: begun and paused
	ready            // destination: prepared
	committed        // source: record durable, word not out
	waiting          // source: word out
	accepted         // destination
	running          // destination
	releasing        // source: acknowledged
	lostShell        // destination: withdraws
	reclaiming       // source: the destination has withdrawn
)

// told is a statement on its way.
type told struct {
	on   bool
	note note
	busy bool
}

type world struct {
	src, dst       node
	ready, word    bool // engine messages in flight
	ack, withdrawn bool
	toSrc, toDst   told
	ran            bool // the destination's copy has run
	killed         bool // a fault has ended a copy
	faults         int8
}

func start() world {
	owned := note{state: Owned, epoch: 4}
	return world{
		src: node{up: true, mem: owned, cache: owned, disk: owned, copy: RunningCopy, engine: copying},
		dst: node{up: true, copy: PausedCopy, shell: true, engine: copying},
	}
}

func (n *node) facts(host string) Facts {
	f := Facts{Host: host, Boot: fmt.Sprint(n.boot), Copy: n.copy, Shell: n.shell && n.copy != NoCopy, Busy: n.engine != off}
	if n.blind {
		f.Copy = UnknownCopy
	}
	return f
}

// step applies an operation. It reports whether it has been done for good: a
// durable one takes two goes, with room for a fault in between.
func (n *node) step(t *testing.T, op Op) bool {
	t.Helper()
	if n.pending {
		n.pending, n.disk, n.mem = false, n.cache, n.cache
		return true
	}
	next, err := Step(n.mem.record(), op, modelHandover, fmt.Sprint(n.boot))
	if err != nil {
		t.Fatalf("%s on %+v: %v", op, *n, err)
	}
	n.cache = noteOf(next)
	if op == OpBegin || op == OpAccept || op == OpCancel {
		n.mem = n.cache
		return true
	}
	n.pending = true
	return false
}

// carryOut does the next step of the plan of a host.
func (w *world) carryOut(t *testing.T, n *node) {
	done := func() { n.plan, n.at = "", 0 }
	op := func(o Op) {
		if n.step(t, o) {
			n.at++
		}
	}
	run := func() { n.copy, n.shell = RunningCopy, false; n.at++ }
	end := func() { n.copy, n.shell = NoCopy, false; n.at++ }
	plans := map[Action][]func(){
		Resume: {func() {
			if n.copy == PausedCopy {
				n.copy = RunningCopy
			}
			n.at++
		}, func() { op(OpCancel) }},
		Run:        {func() { op(OpAccept) }, func() { w.ran = true; run() }, func() { op(OpOwn) }},
		OwnCrashed: {func() { op(OpOwn) }},
		Withdraw:   {func() { op(OpWithdraw) }, end},
		Drop:       {end, func() { op(OpDrop) }},
		Release:    {end, func() { op(OpForget) }},
		Reclaim: {func() { op(OpReclaim) }, func() {
			if n.copy == PausedCopy {
				n.copy = RunningCopy
			}
			n.at++
		}},
	}
	steps := plans[n.plan]
	if n.plan == Drop && (n.mem.state == None || n.mem.state == Gone) {
		steps = steps[:1]
	}
	// Accept and Own are not asked for twice when the record has them.
	steps[n.at]()
	if int(n.at) == len(steps) {
		done()
	}
}

// decide has a host look at what it knows and make a plan.
func (w *world) decide(t *testing.T, n *node, host string, peer *Statement) {
	d := Decide(n.mem.record(), n.facts(host), peer)
	switch d.Action {
	case Rest, Ask, Wait:
	case Resume, Run, OwnCrashed, Withdraw, Drop, Release, Reclaim:
		n.plan, n.at = d.Action, 0
	default:
		t.Fatalf("%s decides %+v of %+v hearing %+v in\n%+v", host, d, *n, peer, *w)
	}
}

func (w *world) sides() [2]struct {
	n, other *node
	name     string
	in, out  *told
	peer     string
} {
	return [2]struct {
		n, other *node
		name     string
		in, out  *told
		peer     string
	}{
		{&w.src, &w.dst, "src", &w.toSrc, &w.toDst, "dst"},
		{&w.dst, &w.src, "dst", &w.toDst, &w.toSrc, "src"},
	}
}

func (m told) statement(host string) *Statement {
	s := Say(m.note.record(), Facts{Host: host, Busy: m.busy})
	return &s
}

// next lists every world that can follow.
func next(t *testing.T, w world) []world {
	var all []world
	try := func(change func(w *world)) {
		c := w
		change(&c)
		if c != w {
			all = append(all, c)
		}
	}
	for i := range 2 {
		side := w.sides()[i]
		n := side.n
		try(func(w *world) { w.sides()[i].n.writeBack() })
		if w.faults < maxFaults {
			try(func(w *world) { w.sides()[i].n.crash(); w.faults++ })
			try(func(w *world) { w.reboot(i); w.faults++ })
			if n.copy != NoCopy {
				try(func(w *world) { w.sides()[i].n.copy, w.killed = NoCopy, true; w.faults++ })
			}
		}
		if !n.up {
			try(func(w *world) { w.sides()[i].n.restart() })
			if n.copy != NoCopy {
				try(func(w *world) { n := w.sides()[i].n; n.restart(); n.blind = true })
			}
			continue
		}
		if n.blind {
			try(func(w *world) { w.sides()[i].n.blind = false })
		}
		switch {
		case n.plan != "":
			try(func(w *world) { w.carryOut(t, w.sides()[i].n) })
			continue
		case n.engine == off:
			try(func(w *world) { w.decide(t, w.sides()[i].n, side.name, nil) })
			if side.in.on {
				try(func(w *world) {
					s := w.sides()[i]
					msg := *s.in
					*s.in = told{}
					w.decide(t, s.n, s.name, msg.statement(s.peer))
				})
			}
		}
		if !n.pending && n.mem.state != None && !side.out.on {
			try(func(w *world) { s := w.sides()[i]; *s.out = told{true, s.n.mem, s.n.engine != off} })
		}
		if side.in.on {
			try(func(w *world) { *w.sides()[i].in = told{} })
		}
	}
	for _, c := range engineSteps(t, w) {
		try(func(w *world) { *w = c })
	}
	return all
}

func (n *node) writeBack() { n.disk = n.cache }

func (n *node) crash() {
	n.up, n.engine, n.plan, n.at, n.pending, n.mem, n.blind = false, off, "", 0, false, note{}, false
}

func (n *node) restart() {
	n.up, n.mem, n.disk = true, n.cache, n.cache
}

func (w *world) reboot(i int) {
	n := w.sides()[i].n
	n.crash()
	n.cache = n.disk
	n.boot++
	if n.copy != NoCopy {
		n.copy, n.shell, w.killed = NoCopy, false, true
	}
	w.ready, w.word, w.ack, w.withdrawn = false, false, false, false
}

// invariant says what is wrong with a world.
func invariant(w world) string {
	switch {
	case w.src.copy == RunningCopy && w.dst.copy == RunningCopy:
		return "two running copies"
	case w.ran && w.src.copy == RunningCopy:
		return "the source's old copy runs after the destination's has run"
	case w.src.mem.record().owns() && w.dst.mem.record().owns():
		return "two owners"
	case w.ran && w.src.mem.record().owns():
		return "the source owns what has run at the destination"
	}
	return ""
}

// heal lets everything come back and both hosts settle it, and says what is
// wrong with the end.
func heal(t *testing.T, w world) string {
	begin := w
	w.toSrc, w.toDst = told{}, told{}
	for range 100 {
		before := w
		for i := range 2 {
			side := w.sides()[i]
			n := side.n
			n.blind = false
			for !n.up || n.engine != off || n.plan != "" {
				switch {
				case !n.up:
					n.restart()
				case n.engine != off:
					w.healEngine(t, n)
				default:
					w.carryOut(t, n)
				}
			}
			w.decide(t, n, side.name, nil)
			if n.plan == "" && side.other.up && !side.other.pending {
				w.decide(t, n, side.name, told{true, side.other.mem, side.other.engine != off}.statement(side.peer))
			}
		}
		if w == before {
			return settled(w)
		}
	}
	return fmt.Sprintf("no end is in sight: %+v from %+v", w, begin)
}

func settled(w world) string {
	a, b := w.src.mem.record(), w.dst.mem.record()
	if a.owns() == b.owns() {
		return fmt.Sprintf("not exactly one owner: src %q, dst %q", a.State, b.State)
	}
	owner, other := w.src, w.dst
	if b.owns() {
		owner, other = w.dst, w.src
	}
	if owner.mem.state != Owned || other.mem.state != None && other.mem.state != Gone {
		return fmt.Sprintf("loose ends: src %q, dst %q", a.State, b.State)
	}
	if other.copy != NoCopy || owner.copy == PausedCopy {
		return fmt.Sprintf("copies left: src %s, dst %s", w.src.copy, w.dst.copy)
	}
	if !w.killed && owner.copy != RunningCopy {
		return "the guest is lost though nothing killed it"
	}
	return ""
}

func TestEveryOrderOfFaults(t *testing.T) {
	first := start()
	from := map[world]world{first: first}
	queue := []world{first}
	for len(queue) > 0 {
		w := queue[0]
		queue = queue[1:]
		bad := invariant(w)
		if bad == "" {
			bad = heal(t, w)
		}
		if bad != "" {
			for back := w; back != first; back = from[back] {
				t.Logf("%+v", back)
			}
			t.Fatal(bad)
		}
		for _, n := range next(t, w) {
			if _, seen := from[n]; !seen {
				from[n] = w
				queue = append(queue, n)
			}
		}
	}
	t.Logf("%d states", len(from))
	if len(from) < 10_000 {
		t.Errorf("only %d states were reached: the model has lost some of its faults", len(from))
	}
}

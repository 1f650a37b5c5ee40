package ledger

import "testing"

// engineSteps is what the engines on both sides may do next, including losing
// each other at any time.
func engineSteps(t *testing.T, w world) []world {
	var all []world
	try := func(change func(w *world)) {
		c := w
		change(&c)
		all = append(all, c)
	}
	s, d := &w.src, &w.dst
	switch s.engine {
	case copying:
		try(func(w *world) {
			w.src.step(t, OpBegin)
			w.src.engine = suspended
			if w.src.copy == RunningCopy {
				w.src.copy = PausedCopy
			}
		})
		try(func(w *world) { w.src.engine = off })
	case suspended:
		if !s.pending { // gives up: contact lost, or cancelled
			try(func(w *world) {
				if w.src.copy == PausedCopy {
					w.src.copy = RunningCopy
				}
				w.src.step(t, OpCancel)
				w.src.engine = off
			})
		}
		if (w.ready || s.pending) && s.copy != NoCopy {
			try(func(w *world) {
				if w.src.step(t, OpHandOver) {
					w.src.engine = committed
				}
			})
		} else if s.pending {
			try(func(w *world) { w.src.step(t, OpHandOver); w.src.engine = committed })
		}
	case committed:
		try(func(w *world) { w.word, w.src.engine = true, waiting })
		try(func(w *world) { w.src.engine = off })
	case waiting:
		if w.ack {
			try(func(w *world) { w.ack, w.src.copy, w.src.engine = false, NoCopy, releasing })
		}
		if w.withdrawn {
			try(func(w *world) { w.withdrawn, w.src.engine = false, reclaiming })
		}
		try(func(w *world) { w.src.engine = off })
	case releasing:
		try(func(w *world) {
			if w.src.step(t, OpForget) {
				w.src.engine = off
			}
		})
	case reclaiming:
		try(func(w *world) {
			if w.src.step(t, OpReclaim) {
				w.src.engine = off
				if w.src.copy == PausedCopy {
					w.src.copy = RunningCopy
				}
			}
		})
	}
	switch d.engine {
	case copying:
		if d.copy == PausedCopy {
			try(func(w *world) {
				if w.dst.step(t, OpPrepare) {
					w.dst.engine, w.ready = ready, true
				}
			})
		}
		if !d.pending {
			try(func(w *world) { w.dst.copy, w.dst.shell, w.dst.engine = NoCopy, false, off })
		} else if d.copy == NoCopy {
			try(func(w *world) { w.dst.step(t, OpPrepare); w.dst.engine = lostShell })
		}
	case ready:
		if d.copy == NoCopy {
			try(func(w *world) { w.dst.engine = lostShell })
		}
		if w.word {
			try(func(w *world) { w.word = false; w.dst.step(t, OpAccept); w.dst.engine = accepted })
		}
		try(func(w *world) { w.dst.engine = off }) // undecided
	case accepted:
		// No vCPU would start. That is noted before the shell is destroyed:
		// the other way round, an agent that died in between would leave an
		// accepted guest without a process, which looks as if it had run.
		try(func(w *world) { w.dst.engine = lostShell })
		try(func(w *world) {
			if w.dst.copy == PausedCopy {
				w.dst.copy, w.dst.shell, w.ran = RunningCopy, false, true
			}
			w.dst.engine = running
		})
	case running:
		try(func(w *world) {
			if w.dst.step(t, OpOwn) {
				w.dst.engine, w.ack = off, true
			}
		})
	case lostShell:
		try(func(w *world) {
			if w.dst.step(t, OpWithdraw) {
				w.dst.engine, w.withdrawn = off, true
			}
		})
	}
	if w.ready || w.word || w.ack || w.withdrawn {
		try(func(w *world) { w.ready, w.word, w.ack, w.withdrawn = false, false, false, false })
	}
	return all
}

// healEngine has an engine find that its other side is silent.
func (w *world) healEngine(t *testing.T, n *node) {
	w.ready, w.word, w.ack, w.withdrawn = false, false, false, false
	c := *w
	isSrc := n == &w.src
	for _, o := range engineSteps(t, c) {
		m := o.dst
		if isSrc {
			m = o.src
		}
		if m != *n && (m.engine == off || n.pending || n.engine == accepted || n.engine == running || n.engine == lostShell || n.engine == releasing || n.engine == reclaiming) {
			*w = o
			return
		}
	}
	t.Fatalf("engine is stuck: %+v", *w)
}

package flat

import (
	"encoding/binary"
	"testing"
	"time"
)

// The time in which one copy stopped and another went on is told from a longer
// one in which the same copy was kept waiting.
func TestProbeTellsTheSwitchover(t *testing.T) {
	const ms = time.Millisecond
	source, destination := &word{mapped: make([]byte, 4)}, &word{mapped: make([]byte, 4)}
	p := &Probe{words: []*word{source, destination}}
	start := time.Now()
	look := func(at time.Duration, here, there uint32) {
		binary.LittleEndian.PutUint32(source.mapped, here)
		binary.LittleEndian.PutUint32(destination.mapped, there)
		p.look(start.Add(at), ms)
	}
	look(1*ms, 10, 0)
	look(2*ms, 11, 10)
	look(42*ms, 12, 11) // the source was kept waiting
	look(43*ms, 12, 12) // copied: nobody went on
	look(63*ms, 12, 13)
	look(64*ms, 12, 14)
	look(94*ms, 12, 15) // the destination was kept waiting
	if g := p.Longest(); g.Length != 40*ms || !g.Start.Equal(start.Add(2*ms)) {
		t.Errorf("the longest gap: %v from %v on", g.Length, g.Start.Sub(start))
	}
	if g := p.Switchover(); g.Length != 21*ms || !g.Start.Equal(start.Add(42*ms)) {
		t.Errorf("the switchover: %v from %v on", g.Length, g.Start.Sub(start))
	}
	p.Reset()
	look(95*ms, 12, 16)
	look(96*ms, 12, 17)
	if g := p.Switchover(); g != (Gap{}) {
		t.Errorf("a switchover without one: %+v", g)
	}
}

package flat

import (
	"encoding/binary"
	"fmt"
	"io"
)

// StateAddr is where the guest keeps its state, in bytes from the start of its
// memory; see flat.S for the layout.
const StateAddr = 0x7e00

// CounterAddr is where the low half of the counter is, the word to watch.
const CounterAddr = StateAddr + 8

const stateLen = 40

// State is what a flat guest says of itself.
type State struct {
	Booted  bool   // the guest has come to its loop
	Counter uint64 // chunks written, or timer ticks; it always goes on
	Pass    uint32 // passes over all pages that are done
	Left    uint32 // pages of this pass that are still to be written
	// Failed says that the guest found a page that did not hold what it had
	// written, and stopped: page Addr held Have instead of Want.
	Failed           bool
	Addr, Have, Want uint32
}

// Err returns why the guest is not healthy, or nil.
func (s State) Err() error {
	switch {
	case !s.Booted:
		return fmt.Errorf("flat guest: not booted, or its memory is lost")
	case s.Failed:
		return fmt.Errorf("flat guest: page %#x held %d where it had written %d", s.Addr, s.Have, s.Want)
	}
	return nil
}

// ReadState reads the state from a guest's memory, whose first byte is guest
// physical address 0.
func ReadState(mem io.ReaderAt) (State, error) {
	var b [stateLen]byte
	if _, err := mem.ReadAt(b[:], StateAddr); err != nil {
		return State{}, fmt.Errorf("flat guest: read its state: %w", err)
	}
	s := parseState(b[:])
	// The two halves of the counter are written one after the other. A
	// second look at the upper one tells a torn read.
	for {
		var again [stateLen]byte
		if _, err := mem.ReadAt(again[:], StateAddr); err != nil {
			return State{}, fmt.Errorf("flat guest: read its state: %w", err)
		}
		t := parseState(again[:])
		if t.Counter>>32 == s.Counter>>32 && t.Counter >= s.Counter {
			return t, nil
		}
		s = t
	}
}

func parseState(b []byte) State {
	le := binary.LittleEndian
	return State{
		Booted:  string(b[:4]) == "LMFG" && le.Uint32(b[4:]) == 1,
		Counter: le.Uint64(b[8:]),
		Pass:    le.Uint32(b[16:]),
		Left:    le.Uint32(b[20:]),
		Failed:  le.Uint32(b[24:]) != 0,
		Addr:    le.Uint32(b[28:]),
		Have:    le.Uint32(b[32:]),
		Want:    le.Uint32(b[36:]),
	}
}

// Check proves that every page that a guest of configuration c dirties is as
// the guest left it. A pass writes each page once, in a known order, so that at
// any moment some number of pages hold n+1 and all that come after hold n.
//
// Of a guest that is stopped the proof is exact. Of one that runs (stopped
// false) pages change while they are read, and the check is that no page holds
// a value from before the passes that were current when the check began, nor
// from after those current when it ended.
func (c Config) Check(mem io.ReaderAt, stopped bool) (State, error) {
	before, err := ReadState(mem)
	if err != nil {
		return State{}, err
	}
	if err := before.Err(); err != nil {
		return before, err
	}
	values, err := c.readPages(mem)
	if err != nil {
		return before, err
	}
	after, err := ReadState(mem)
	if err != nil {
		return before, err
	}
	if err := after.Err(); err != nil {
		return after, err
	}
	if stopped && before.Counter != after.Counter {
		return after, fmt.Errorf("flat guest: said to be stopped, but its counter goes on")
	}
	return after, c.judge(values, before.Pass, after.Pass, stopped)
}

// readPages returns what each page holds, in the order in which the guest
// visits them.
func (c Config) readPages(mem io.ReaderAt) ([]uint32, error) {
	values := make([]uint32, c.Pages)
	page, stride := 0, c.stride()
	var b [4]byte
	for i := range values {
		if _, err := mem.ReadAt(b[:], c.addr(page)); err != nil {
			return nil, fmt.Errorf("flat guest: read page %#x: %w", c.addr(page), err)
		}
		values[i] = binary.LittleEndian.Uint32(b[:])
		page = (page + stride) % c.Pages
	}
	return values, nil
}

func (c Config) addr(page int) int64 { return FirstPage + int64(page)*PageSize }

func (c Config) judge(values []uint32, first, last uint32, stopped bool) error {
	wrong := func(i int, want string) error {
		page := i * c.stride() % max(c.Pages, 1)
		return fmt.Errorf("flat guest: page %#x holds %d, not %s", c.addr(page), values[i], want)
	}
	if c.Pattern == Rewrite || c.Rate == 0 {
		for i, v := range values {
			if v != 0 {
				return wrong(i, "0")
			}
		}
		return nil
	}
	if !stopped {
		// Differences, so that the pass number may wrap round.
		for i, v := range values {
			if v-first > last+1-first {
				return wrong(i, fmt.Sprintf("%d to %d", first, last+1))
			}
		}
		return nil
	}
	want := first + 1
	for i, v := range values {
		if v == want {
			continue
		}
		if want == first+1 && v == first {
			want = first // from here on nothing has been written in this pass
			continue
		}
		return wrong(i, fmt.Sprint(want))
	}
	return nil
}

package migrate

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"
	"time"
)

// fakeRelayGuest has a hypervisor that makes the passes, each some bytes of its
// stream. Its memory is nobody's to map.
type fakeRelayGuest struct {
	*fakeGuest
	stream    []byte // all that it says
	stopAfter int    // passes after which it stops by itself, 0 for never
	slow      bool   // what is left would take far too long
	err       error  // of AwaitPass, in the second pass
	relayErr  error

	conn     io.ReadWriter
	pass     int
	sent     int
	stopped  time.Time
	answered chan string
}

// streamEnd tells the other side's hypervisor that this was all.
var streamEnd = []byte("the end of the stream")

const fakePassBytes = 1 << 20

func newFakeRelay(t *testing.T) (*fakeRun, *fakeRelayGuest) {
	r := newFakeRun(t)
	g := &fakeRelayGuest{fakeGuest: r.guest, answered: make(chan string, 1)}
	g.refuse = &Refusal{Reasons: []string{"memory is private"}}
	half := make([]byte, 4*fakePassBytes+12345) // half of it can be compressed
	for i := range half {
		half[i] = byte(rand.IntN(256))
	}
	g.stream = slices.Concat(half, make([]byte, len(half)), streamEnd)
	r.host.shell.end = streamEnd
	r.options = Options{MaxPasses: 3}
	r.tune = func(_ *Sender, j *Job, _ *Receiver) { j.Guest = g }
	return r, g
}

func (g *fakeRelayGuest) Relayable(context.Context) error { return g.relayErr }

func (g *fakeRelayGuest) Relay(_ context.Context, conn io.ReadWriter, _ time.Duration) (int64, error) {
	g.conn = conn
	go func() {
		answer, err := io.ReadAll(io.LimitReader(conn, int64(len(fakeAnswer))))
		if err != nil {
			g.t.Error(err)
		}
		g.answered <- string(answer)
	}()
	return 3017 * PageSize, nil
}

func (g *fakeRelayGuest) AwaitPass(context.Context) (RelayPass, error) {
	if g.pass++; g.pass == 2 && g.err != nil {
		return RelayPass{}, g.err
	}
	n, err := g.conn.Write(g.stream[g.sent : g.sent+fakePassBytes])
	g.sent += n
	p := RelayPass{Pass: Pass{Pages: fakePassBytes / PageSize, ZeroPages: 3, Duration: time.Millisecond, DirtyAfter: 1 << 20 / int64(g.pass*g.pass)}}
	if g.slow {
		p.Duration, p.DirtyAfter, p.ZeroPages = time.Second, 1<<20, 0
	}
	if g.pass == g.stopAfter {
		g.stopped, p.Stopped = time.Now(), true
	}
	return p, err
}

func (g *fakeRelayGuest) Suspend(_ context.Context, w io.Writer) (time.Time, error) {
	if w != nil {
		return time.Time{}, errors.New("a writer in relay mode")
	}
	if g.stopped.IsZero() {
		g.stopped = time.Now()
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	g.running = false
	return g.stopped, nil
}

func (g *fakeRelayGuest) SaveState(ctx context.Context) error {
	if _, err := g.conn.Write(g.stream[g.sent:]); err != nil {
		return err
	}
	select {
	case answer := <-g.answered:
		if answer != fakeAnswer {
			return fmt.Errorf("the other side answers %q", answer)
		}
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

func TestRelay(t *testing.T) {
	for _, streams := range []int{1, 3} {
		for _, compress := range []bool{false, true} {
			t.Run(fmt.Sprintf("streams=%d,compress=%v", streams, compress), func(t *testing.T) {
				r, g := newFakeRelay(t)
				r.options.Streams, r.options.Compress = streams, compress
				report, err := r.migrate(context.Background())
				if err != nil {
					t.Fatal(err)
				}
				if !bytes.Equal(r.host.shell.loaded, g.stream) {
					t.Errorf("%d bytes arrived, or changed, of %d", len(r.host.shell.loaded), len(g.stream))
				}
				if !r.host.shell.resumed || !g.released || g.running || !g.forwarded {
					t.Errorf("shell resumed %v, source released %v and running %v", r.host.shell.resumed, g.released, g.running)
				}
				want := []string{"prepare", "begin", "hand over", "accept", "own", "forget"}
				if !slices.Equal(r.ledger.calls, want) {
					t.Errorf("ledger saw %q, want %q", r.ledger.calls, want)
				}
				if report.Mode != Relay || report.SwitchoverReason != MaxPasses || len(report.Passes) != 3 || report.RAMBytes != 3017*PageSize {
					t.Errorf("report %+v", report)
				}
				if less := report.BytesSent < int64(len(g.stream))*2/3; less != compress {
					t.Errorf("%d bytes sent of %d, compressed: %v", report.BytesSent, len(g.stream), compress)
				}
				if report.Downtime <= 0 || report.DowntimeParts.StateBytes != int64(len(g.stream)-3*fakePassBytes) {
					t.Errorf("downtime %v, %d bytes with the guest stopped", report.Downtime, report.DowntimeParts.StateBytes)
				}
			})
		}
	}
}

// A hypervisor may stop the guest by itself.
func TestRelayStopsByItself(t *testing.T) {
	r, g := newFakeRelay(t)
	g.stopAfter = 2
	report, err := r.migrate(context.Background())
	if err != nil {
		t.Fatal(err)
	}
	if report.SwitchoverReason != Converged || len(report.Passes) != 2 || !bytes.Equal(r.host.shell.loaded, g.stream) {
		t.Errorf("%s after %d passes", report.SwitchoverReason, len(report.Passes))
	}
}

// What cannot be relayed is refused, and what fails goes on at the source.
func TestRelayGoesOnAtTheSource(t *testing.T) {
	for name, c := range map[string]struct {
		arrange func(*fakeRun, *fakeRelayGuest)
		result  Result
		message string
	}{
		"asked to verify":   {func(r *fakeRun, _ *fakeRelayGuest) { r.options.Verify = true }, Refused, "cannot be verified"},
		"only directly":     {func(r *fakeRun, _ *fakeRelayGuest) { r.options.Mode = Direct }, Refused, "memory is private"},
		"not relayable":     {func(_ *fakeRun, g *fakeRelayGuest) { g.relayErr = &Refusal{Reasons: []string{"emulated"}} }, Refused, "emulated; memory is private"},
		"refused there":     {func(r *fakeRun, _ *fakeRelayGuest) { r.host.err = &Refusal{Reasons: []string{"no room"}} }, Refused, "no room"},
		"fails in a pass":   {func(_ *fakeRun, g *fakeRelayGuest) { g.err = errors.New("boom") }, Failed, "pass 2: boom"},
		"load fails":        {func(r *fakeRun, _ *fakeRelayGuest) { r.host.shell.loadErr = errors.New("bad stream") }, Failed, "bad stream"},
		"writes too much":   {func(_ *fakeRun, g *fakeRelayGuest) { g.slow = true }, Failed, "writes faster"},
		"shell has no room": {func(r *fakeRun, _ *fakeRelayGuest) { r.ledger.fail["prepare"] = errors.New("disk full") }, Refused, "disk full"},
	} {
		t.Run(name, func(t *testing.T) {
			r, g := newFakeRelay(t)
			c.arrange(r, g)
			report, err := r.migrate(context.Background())
			if err == nil || report.Result != c.result || !strings.Contains(report.Error, c.message) {
				t.Fatalf("%s: %s; want %s with %q", report.Result, report.Error, c.result, c.message)
			}
			if !g.running || g.released || r.host.shell.resumed || r.ledger.has("hand over") {
				t.Errorf("running %v, released %v, shell resumed %v", g.running, g.released, r.host.shell.resumed)
			}
			if r.ledger.has("begin") && (g.resumed != 1 || !r.ledger.has("cancel")) {
				t.Errorf("resumed %d times, ledger saw %q", g.resumed, r.ledger.calls)
			}
		})
	}
}

// A guest that no hypervisor copies is not asked to.
func TestRelayOfOthers(t *testing.T) {
	r := newFakeRun(t)
	r.options = Options{Mode: Relay}
	report, err := r.migrate(context.Background())
	if err == nil || report.Result != Refused || !strings.Contains(report.Error, "direct mode only") {
		t.Errorf("%s: %s", report.Result, report.Error)
	}
}

// TestHostileRelay sends what no honest source relays.
func TestHostileRelay(t *testing.T) {
	data := bytes.Repeat([]byte{7}, 100)
	chunk := dataHeader{typ: dataStream, pages: 100, pass: 1, length: 100}
	with := func(change func(*dataHeader)) dataHeader { h := chunk; change(&h); return h }
	end := frameBytes(dataHeader{typ: dataEnd, pass: 1})
	for name, c := range map[string]struct {
		stream []byte
		want   string
	}{
		"pages":       {frameBytes(dataHeader{typ: dataZero, pages: 1, pass: 1}), "in relay mode"},
		"out of turn": {frameBytes(with(func(h *dataHeader) { h.first = 1 }), data...), "chunk 1 where 0"},
		"of a block":  {frameBytes(with(func(h *dataHeader) { h.block = 1 }), data...), "block 1"},
		"too large":   {frameBytes(with(func(h *dataHeader) { h.pages, h.length = maxChunk+1, maxChunk+1 })), "262145 bytes"},
		"length lies": {frameBytes(with(func(h *dataHeader) { h.length = 99 })), "takes 99"},
		"encoding":    {frameBytes(with(func(h *dataHeader) { h.enc, h.length = 2, 50 })), "encoding 2"},
		"not packed":  {frameBytes(with(func(h *dataHeader) { h.enc, h.length = zstandard, 50 }), data[:50]...), "chunk 0"},
		"truncated":   {frameBytes(chunk, data[:10]...), "EOF"},
		"after end":   {slices.Concat(frameBytes(chunk, data...), end, frameBytes(chunk, data...)), "after the end"},
		"no end":      {frameBytes(chunk, data...), "EOF"},
	} {
		t.Run(name, func(t *testing.T) {
			r := newRogue(t)
			r.offerOf(offerMsg{Mode: Relay, Streams: 1})
			conn := r.dial(preamble{role: roleData, id: testID})
			if _, err := conn.Write(c.stream); err != nil {
				t.Fatal(err)
			}
			_ = conn.CloseWrite() // it fails when the destination has hung up by now, as it should
			r.rejected(c.want)
		})
	}
	t.Run("stopped twice", func(t *testing.T) {
		r := newRogue(t)
		r.offerOf(offerMsg{Mode: Relay, Streams: 1})
		if err := firstError(r.ctl.send(ctlStopped, stoppedMsg{Pass: 1}), r.ctl.send(ctlStopped, stoppedMsg{Pass: 2})); err != nil {
			t.Fatal(err)
		}
		r.rejected("last pass 2")
	})
	t.Run("device state", func(t *testing.T) {
		r := newRogue(t)
		r.offerOf(offerMsg{Mode: Relay, Streams: 1})
		if err := r.ctl.raw(ctlState, data); err != nil {
			t.Fatal(err)
		}
		r.rejected("device state in relay mode")
	})
}

// A stream that one connection ends while another goes on is none.
func TestAssemblyOfUnequalStreams(t *testing.T) {
	a, err := newAssembly(2)
	if err != nil {
		t.Fatal(err)
	}
	defer a.close()
	chunk := func(number uint64) []byte {
		return frameBytes(dataHeader{typ: dataStream, pages: 3, first: number, pass: 1, length: 3}, 1, 2, 3)
	}
	end := frameBytes(dataHeader{typ: dataEnd, pass: 1})
	first := bytes.NewReader(slices.Concat(chunk(0), end))
	second := bytes.NewReader(slices.Concat(chunk(1), chunk(3), end)) // chunk 2 is missing
	for i, r := range []io.Reader{first, second} {
		if err := a.serve(i, r); !errors.Is(err, io.EOF) {
			t.Fatalf("stream %d: %v", i, err)
		}
	}
	if b, err := io.ReadAll(a); !errors.Is(err, ErrProtocol) || len(b) != 6 {
		t.Errorf("%d bytes, %v", len(b), err)
	}
}

func TestAnswersAreBounded(t *testing.T) {
	a := newAnswers()
	for range maxAnswers / maxAnswer {
		if err := a.write(make([]byte, maxAnswer)); err != nil {
			t.Fatal(err)
		}
	}
	if err := a.write([]byte{1}); !errors.Is(err, ErrProtocol) {
		t.Errorf("one more: %v", err)
	}
	a.close()
	if b, err := io.ReadAll(a); len(b) != maxAnswers || err != nil {
		t.Errorf("%d bytes, %v", len(b), err)
	}
}

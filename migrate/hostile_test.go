package migrate

import (
	"bytes"
	"context"
	"encoding/json"
	"math/rand/v2"
	"net"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/uuid"
)

// rogue is a source that speaks the protocol only as far as a test wants.
type rogue struct {
	t       *testing.T
	shell   *fakeShell
	ledger  *fakeLedger
	recv    *Receiver
	addr    string
	ctl     *control
	mu      sync.Mutex
	errs    []error
	serving sync.WaitGroup
}

func newRogue(t *testing.T) *rogue {
	r := &rogue{t: t, shell: &fakeShell{}, ledger: &fakeLedger{fail: map[string]error{}}}
	r.recv = &Receiver{
		Name: "host2", Host: &fakeHost{t: t, shell: r.shell}, Ledger: fakeDestLedger{r.ledger},
		Undecided: func(Incoming) { t.Error("a rogue's shell was kept") },
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	r.addr = l.Addr().String()
	r.serving.Add(1)
	go func() {
		defer r.serving.Done()
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			r.serving.Add(1)
			go func() {
				defer r.serving.Done()
				peer := "host1"
				err := r.recv.Serve(context.Background(), c, peer)
				r.mu.Lock()
				r.errs = append(r.errs, err)
				r.mu.Unlock()
			}()
		}
	}()
	t.Cleanup(func() { l.Close(); r.serving.Wait() })
	return r
}

func (r *rogue) dial(p preamble) *net.TCPConn {
	r.t.Helper()
	c, err := net.Dial("tcp", r.addr)
	if err != nil {
		r.t.Fatal(err)
	}
	r.t.Cleanup(func() { c.Close() })
	if _, err := c.Write(p.append(nil)); err != nil {
		r.t.Fatal(err)
	}
	return c.(*net.TCPConn)
}

// offer gets a shell of 64 pages with one stream prepared.
func (r *rogue) offer() {
	r.t.Helper()
	r.offerOf(offerMsg{Mode: Direct, Blocks: []BlockInfo{{Name: "ram", Size: 64 * PageSize}}, Streams: 1})
}

// offerOf completes an offer and gets it prepared.
func (r *rogue) offerOf(m offerMsg) {
	r.t.Helper()
	r.ctl = newControl(r.dial(preamble{id: testID}), 2*time.Second)
	r.t.Cleanup(r.ctl.close)
	m.Handover = Handover{ID: testID.String(), Guest: "g", UUID: uuid.NewString(), Source: "host1", Destination: "host2", Epoch: 1}
	m.Definition = []byte("definition")
	if err := r.ctl.send(ctlOffer, m); err != nil {
		r.t.Fatal(err)
	}
	if typ, body, err := r.ctl.recv(); typ != ctlPrepared || err != nil {
		r.t.Fatalf("got %v %q, %v", typ, body, err)
	}
}

// rejected waits for the destination's word that it failed, and checks that
// nothing of the shell is left.
func (r *rogue) rejected(want string) {
	r.t.Helper()
	typ, body, err := r.ctl.recv()
	for err == nil && typ == ctlPassDone {
		typ, body, err = r.ctl.recv()
	}
	var m reasonMsg
	if err != nil || typ != ctlFailed || json.Unmarshal(body, &m) != nil || !strings.Contains(m.Reason, want) {
		r.t.Fatalf("got %v %q, %v; want failed with %q", typ, body, err, want)
	}
	r.ctl.close()
	if !r.shell.destroyed || r.shell.resumed || !r.ledger.has("drop") {
		r.t.Errorf("shell destroyed %v, resumed %v, ledger %q", r.shell.destroyed, r.shell.resumed, r.ledger.calls)
	}
}

func frameBytes(h dataHeader, payload ...byte) []byte {
	b := make([]byte, dataHdrSize)
	h.put(b)
	return append(b, payload...)
}

// TestHostileDataStream sends what no honest source sends.
func TestHostileDataStream(t *testing.T) {
	page := bytes.Repeat([]byte{7}, PageSize)
	pages := dataHeader{typ: dataPages, pages: 1, pass: 1, length: PageSize}
	with := func(change func(*dataHeader)) dataHeader { h := pages; change(&h); return h }
	random := make([]byte, 100_000)
	for i := range random {
		random[i] = byte(rand.IntN(256))
	}
	random[0] = 0xee // no type of frame
	for name, c := range map[string]struct {
		stream []byte
		want   string
	}{
		"random":            {random, "protocol violation"},
		"truncated header":  {frameBytes(pages)[:10], "EOF"},
		"truncated payload": {frameBytes(pages, page[:100]...), "EOF"},
		"nothing":           {nil, "EOF"},
		"oversize frame":    {frameBytes(with(func(h *dataHeader) { h.pages, h.length = 1<<20, 0 })), "1048576 pages"},
		"length lies":       {frameBytes(with(func(h *dataHeader) { h.length = 1 << 30 })), "1073741824 bytes"},
		"outside":           {frameBytes(with(func(h *dataHeader) { h.first = 64 }), page...), "pages 64+1"},
		"other block":       {frameBytes(with(func(h *dataHeader) { h.block = 9 }), page...), "block 9 of 1"},
		"later pass":        {frameBytes(with(func(h *dataHeader) { h.pass = 2 }), page...), "pass 2 while pass 1"},
		"earlier pass":      {append(frameBytes(dataHeader{typ: dataEnd, pass: 1}), frameBytes(pages, page...)...), "pass 1 while pass 2"},
		"hashes twice": {append(frameBytes(dataHeader{typ: dataZeroHashes, pages: 2, pass: 1}),
			frameBytes(dataHeader{typ: dataZeroHashes, first: 1, pages: 2, pass: 1})...), "come twice"},
	} {
		t.Run(name, func(t *testing.T) {
			r := newRogue(t)
			r.offer()
			conn := r.dial(preamble{role: roleData, id: testID})
			if _, err := conn.Write(c.stream); err != nil {
				t.Fatal(err)
			}
			// It fails when the destination has hung up by now, as it should.
			_ = conn.CloseWrite()
			r.rejected(c.want)
		})
	}
}

// TestHostileControlStream breaks the order of the control frames.
func TestHostileControlStream(t *testing.T) {
	for name, c := range map[string]struct {
		send func(*control) error
		want string
	}{
		"commit before ready": {func(c *control) error { return c.raw(ctlCommit, nil) }, "before ready"},
		"offer twice":         {func(c *control) error { return c.send(ctlOffer, offerMsg{}) }, "offer from the source"},
		"destination's word":  {func(c *control) error { return c.raw(ctlReady, nil) }, "ready from the source"},
		"stopped twice": {func(c *control) error {
			return firstError(c.send(ctlStopped, stoppedMsg{Pass: 1}), c.send(ctlStopped, stoppedMsg{Pass: 1}))
		}, "stopped twice"},
		"state ends early": {func(c *control) error { return c.send(ctlStateEnd, stateEndMsg{Bytes: 0}) }, "none was due"},
		"unknown type":     {func(c *control) error { return c.raw(99, nil) }, "type 99"},
		"oversize": {func(c *control) error {
			_, err := c.conn.Write(appendControlHeader(nil, ctlStopped, maxControlBody+1))
			return err
		}, "at most 1048576"},
	} {
		t.Run(name, func(t *testing.T) {
			r := newRogue(t)
			r.offer()
			if err := c.send(r.ctl); err != nil {
				t.Fatal(err)
			}
			r.rejected(c.want)
		})
	}
}

func firstError(errs ...error) error {
	for _, err := range errs {
		if err != nil {
			return err
		}
	}
	return nil
}

// TestStrangersStream opens data streams that were not offered.
func TestStrangersStream(t *testing.T) {
	r := newRogue(t)
	r.offer()
	for _, p := range []preamble{
		{role: roleData, id: uuid.New()},       // another migration
		{role: roleData, index: 1, id: testID}, // one stream was offered
		{role: roleControl, id: testID},        // a second offer for the same migration
	} {
		c := r.dial(p)
		if err := c.SetReadDeadline(time.Now().Add(10 * time.Second)); err != nil {
			t.Fatal(err)
		}
		if n, err := c.Read(make([]byte, 1)); n != 0 || err == nil {
			t.Errorf("%+v: got an answer", p)
		}
	}
	// The honest migration is none the worse for it.
	if err := r.ctl.send(ctlAbort, reasonMsg{Reason: "enough"}); err != nil {
		t.Fatal(err)
	}
	if typ, _, err := r.ctl.recv(); err == nil {
		t.Errorf("got %v after the abort", typ)
	}
	r.ctl.close()
	if r.recv.Active(testID.String()) {
		t.Error("the session is still active")
	}
}

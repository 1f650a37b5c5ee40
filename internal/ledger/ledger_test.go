package ledger

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/lmctl/lmctl/migrate"
)

func open(t *testing.T, dir, host, boot string) *Ledger {
	t.Helper()
	l, err := Open(dir, host, boot, slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := l.Close(); err != nil {
			t.Error(err)
		}
	})
	return l
}

func must(t *testing.T, errs ...error) {
	t.Helper()
	for i, err := range errs {
		if err != nil {
			t.Fatalf("step %d: %v", i, err)
		}
	}
}

func handover(epoch uint64) migrate.Handover {
	return migrate.Handover{ID: fmt.Sprintf("id-%d", epoch), Guest: "g", UUID: "u", Source: "src", Destination: "dst", Epoch: epoch}
}

func TestThereAndBack(t *testing.T) {
	ctx := t.Context()
	src, dst := open(t, t.TempDir(), "src", "b"), open(t, t.TempDir(), "dst", "b")
	must(t, src.Define(ctx, "g", "u"))
	for epoch := uint64(2); epoch < 12; epoch++ {
		h := handover(epoch)
		h.Source, h.Destination = src.host, dst.host
		must(t, dst.Prepare(ctx, h), src.Begin(ctx, h), src.HandOver(ctx, h), dst.Accept(ctx, h), dst.Own(ctx, h), src.Forget(ctx, h))
		if src.Owns("g") == nil || dst.Owns("g") != nil {
			t.Fatalf("epoch %d: src %+v, dst %+v", epoch, src.Get("g"), dst.Get("g"))
		}
		if got := dst.Get("g").Epoch; got != epoch {
			t.Fatalf("epoch %d, want %d", got, epoch)
		}
		src, dst = dst, src
	}
}

func TestRecordSurvives(t *testing.T) {
	ctx := t.Context()
	dir := t.TempDir()
	h := handover(2)
	l := open(t, dir, "src", "b1")
	must(t, l.Define(ctx, "g", "u"), l.Begin(ctx, h))
	if r := open(t, dir, "src", "b1").Get("g"); r.State != Moving || *r.Handover != h {
		t.Fatalf("after Begin: %+v", r)
	}
	must(t, l.HandOver(ctx, h))
	r := open(t, dir, "src", "b2").Get("g")
	if r.State != HandedOver || r.Boot != "b1" || r.Time.IsZero() {
		t.Fatalf("after HandOver: %+v", r)
	}
}

func TestHandOverErrors(t *testing.T) {
	ctx := t.Context()
	l := open(t, t.TempDir(), "src", "b")
	h := handover(2)
	must(t, l.Define(ctx, "g", "u"))
	if err := l.HandOver(ctx, h); !errors.Is(err, migrate.ErrNotHandedOver) {
		t.Errorf("without Begin: %v", err)
	}
	must(t, l.Begin(ctx, h), l.Cancel(ctx, h))
	if err := l.HandOver(ctx, h); !errors.Is(err, migrate.ErrNotHandedOver) {
		t.Errorf("after Cancel: %v", err)
	}
	must(t, l.Begin(ctx, h))
	gone, cancel := context.WithCancel(ctx)
	cancel()
	if err := l.HandOver(gone, h); !errors.Is(err, migrate.ErrNotHandedOver) || !errors.Is(err, context.Canceled) {
		t.Errorf("after its context has ended: %v", err)
	}
	must(t, l.HandOver(ctx, h))
	var state *StateError
	if err := l.Cancel(ctx, h); !errors.As(err, &state) || state.State != HandedOver {
		t.Errorf("Cancel after HandOver: %v", err)
	}
	must(t, l.Reclaim(ctx, h))
	if r := l.Get("g"); r.State != Owned || r.Epoch != 3 {
		t.Errorf("after Reclaim: %+v", r)
	}
}

func TestPrepareRefusals(t *testing.T) {
	ctx := t.Context()
	l := open(t, t.TempDir(), "dst", "b")
	must(t, l.Define(ctx, "g", "mine"))
	var refusal *migrate.Refusal
	if err := l.Prepare(ctx, handover(2)); !errors.As(err, &refusal) || !strings.Contains(err.Error(), "is this host's") {
		t.Errorf("a guest of that name is here: %v", err)
	}
	wrong := handover(2)
	wrong.Destination = "third"
	if err := l.Prepare(ctx, wrong); err == nil {
		t.Error("prepared for a handover to another host")
	}
	odd := handover(2)
	odd.Guest = "../g"
	if err := l.Prepare(ctx, odd); err == nil {
		t.Error("prepared a guest whose name leaves the folder")
	}
}

func TestWithdraw(t *testing.T) {
	ctx := t.Context()
	dir := t.TempDir()
	l := open(t, dir, "dst", "b1")
	h := handover(2)
	must(t, l.Prepare(ctx, h), l.Withdraw(ctx, h), l.Withdraw(ctx, h))
	if err := l.Accept(ctx, h); err == nil {
		t.Error("accepted what was withdrawn")
	}
	must(t, l.Drop(ctx, h), l.Drop(ctx, h))
	if _, err := os.Stat(filepath.Join(dir, "g"+suffix)); !os.IsNotExist(err) {
		t.Errorf("a dropped record is still there: %v", err)
	}
	must(t, l.Prepare(ctx, h), l.Accept(ctx, h), l.Withdraw(ctx, h), l.Drop(ctx, h))
	must(t, l.Prepare(ctx, h), l.Accept(ctx, h), l.Own(ctx, h))
	if err := l.Withdraw(ctx, h); err == nil {
		t.Error("withdrew what is owned")
	}
	must(t, l.Undefine(ctx, "g"))
	h.ID = "another"
	must(t, l.Prepare(ctx, h), l.Accept(ctx, h))
	after := open(t, dir, "dst", "b2")
	if err := after.Withdraw(ctx, h); err == nil {
		t.Error("withdrew what may have run before the host restarted")
	}
	if err := after.Own(ctx, h); err != nil {
		t.Errorf("own after a restart: %v", err)
	}
}

// TestRebootMakesPreparedUncertain: a prepared shell of an earlier boot can
// neither be accepted nor withdrawn, only owned or dropped.
func TestRebootMakesPreparedUncertain(t *testing.T) {
	ctx := t.Context()
	dir := t.TempDir()
	h := handover(2)
	must(t, open(t, dir, "dst", "b1").Prepare(ctx, h))
	l := open(t, dir, "dst", "b2")
	if l.Accept(ctx, h) == nil || l.Withdraw(ctx, h) == nil {
		t.Error("a shell of an earlier boot was accepted or withdrawn")
	}
	must(t, l.Own(ctx, h))
}

func TestDamagedRecord(t *testing.T) {
	dir := t.TempDir()
	l := open(t, dir, "src", "b")
	must(t, l.Define(t.Context(), "g", "u"), l.Define(t.Context(), "fine", "v"))
	if err := os.WriteFile(filepath.Join(dir, "g"+suffix), bytes.Repeat([]byte("x"), 2*slotSize), 0o600); err != nil {
		t.Fatal(err)
	}
	again := open(t, dir, "src", "b")
	if r := again.Get("g"); r.State != Damaged {
		t.Fatalf("damaged record reads %+v", r)
	}
	if again.Owns("fine") != nil || again.Owns("g") == nil {
		t.Error("the wrong guest may run")
	}
	if err := again.Begin(t.Context(), handover(2)); err == nil {
		t.Error("a guest with a damaged record was moved")
	}
	must(t, again.Claim(t.Context(), "g", "u", 7))
	if r := open(t, dir, "src", "b").Get("g"); r.State != Owned || r.Epoch != 8 {
		t.Errorf("after a claim: %+v", r)
	}
}

// fakeDisk is a file whose page cache and platter are two things, and whose
// nth call fails after part of it.
type fakeDisk struct {
	cache, platter []byte
	failAt, tear   int
	calls          int
	stuck          bool // every call from failAt on fails
}

var errDisk = errors.New("input/output error")

func newFakeDisk() *fakeDisk {
	return &fakeDisk{cache: make([]byte, 2*slotSize), platter: make([]byte, 2*slotSize), failAt: -1}
}

func (d *fakeDisk) fails() bool {
	d.calls++
	return d.failAt >= 0 && (d.calls-1 == d.failAt || d.stuck && d.calls > d.failAt)
}

func (d *fakeDisk) ReadAt(p []byte, off int64) (int, error) {
	return bytes.NewReader(d.cache).ReadAt(p, off)
}

func (d *fakeDisk) WriteAt(p []byte, off int64) (int, error) {
	if d.fails() {
		return copy(d.cache[off:off+int64(d.tear)], p), errDisk
	}
	return copy(d.cache[off:], p), nil
}

func (d *fakeDisk) Datasync() error {
	if d.fails() {
		return errDisk
	}
	copy(d.platter, d.cache)
	return nil
}

func (d *fakeDisk) Close() error { return nil }

// powerCut is the disk after a power cut in which only some of the sectors of
// the page cache had been written.
func (d *fakeDisk) powerCut(sectors uint) *fakeDisk {
	c := newFakeDisk()
	copy(c.platter, d.platter)
	for s := range 2 * slotSize / 512 {
		if sectors&(1<<s) != 0 {
			copy(c.platter[s*512:(s+1)*512], d.cache[s*512:])
		}
	}
	copy(c.cache, c.platter)
	return c
}

func reread(t *testing.T, d *fakeDisk) Record {
	t.Helper()
	d.failAt = -1
	_, r, err := readSlots(d)
	if err != nil {
		t.Fatalf("after the crash: %v", err)
	}
	return r
}

// TestCrashAtEveryWrite writes a chain of records, durable and not, and cuts
// the power at every call with every pattern of sectors: what is read then is
// the last durable record or one written after it.
func TestCrashAtEveryWrite(t *testing.T) {
	chain := []struct {
		state   State
		durable bool
	}{{Owned, true}, {Moving, false}, {HandedOver, true}, {Owned, true}, {Moving, false}, {Moving, false}, {HandedOver, true}, {Gone, true}}
	h := modelHandover
	d := newFakeDisk()
	s := &slots{disk: d, durable: 1}
	old, lastDurable := Record{}, -1
	for i, c := range chain {
		r := Record{State: c.state, Guest: "g", UUID: "u", Epoch: uint64(i + 1), Handover: &h}
		before := *d
		before.cache, before.platter = bytes.Clone(d.cache), bytes.Clone(d.platter)
		if err := s.write(r, old, c.durable); err != nil {
			t.Fatal(err)
		}
		if i > 0 {
			torn := before
			torn.cache = d.cache
			for sectors := uint(0); sectors < 1<<16; sectors += 37 {
				got := reread(t, torn.powerCut(sectors))
				if got.Epoch < uint64(lastDurable+1) || got.Epoch > r.Epoch {
					t.Fatalf("record %d, sectors %016b: read epoch %d, durable was %d", i, sectors, got.Epoch, lastDurable+1)
				}
			}
		}
		if c.durable {
			lastDurable = i
			if got := reread(t, d.powerCut(0)); got.Epoch != r.Epoch {
				t.Fatalf("record %d is not on the disk: epoch %d", i, got.Epoch)
			}
		}
		old = r
	}
}

// TestFailedWriteIsTakenBack: when a call of a durable write fails, torn at any
// byte, the old record stands now and after a crash, or the error says that
// nobody knows.
func TestFailedWriteIsTakenBack(t *testing.T) {
	h := modelHandover
	old := Record{State: Moving, Guest: "g", UUID: "u", Epoch: 4, Handover: &h}
	next := Record{State: HandedOver, Guest: "g", UUID: "u", Epoch: 5, Handover: &h}
	for call := range 2 {
		for tear := 0; tear <= slotSize; tear += 61 {
			for _, stuck := range []bool{false, true} {
				d := newFakeDisk()
				s := &slots{disk: d, durable: 1}
				must(t, s.write(old, Record{}, true))
				d.failAt, d.tear, d.stuck = d.calls+call, tear, stuck
				err := s.write(next, old, true)
				if !errors.Is(err, errDisk) || errors.Is(err, errUncertain) != stuck {
					t.Fatalf("call %d torn at %d, stuck %t: %v", call, tear, stuck, err)
				}
				if !stuck {
					if got := reread(t, d.powerCut(0)); got.State != Moving {
						t.Fatalf("call %d torn at %d: %s stands", call, tear, got.State)
					}
					if got := reread(t, d.powerCut(^uint(0))); got.State != Moving {
						t.Fatalf("call %d torn at %d: %s stands in the page cache", call, tear, got.State)
					}
				}
			}
		}
	}
}

func FuzzDecodeSlot(f *testing.F) {
	h := modelHandover
	good, err := encodeSlot(Record{State: HandedOver, Guest: "g", UUID: "u", Epoch: 5, Handover: &h}, 3)
	if err != nil {
		f.Fatal(err)
	}
	f.Add(good)
	f.Add(good[:100])
	f.Add(make([]byte, slotSize))
	flipped := bytes.Clone(good)
	flipped[slotHeader+3] ^= 1
	f.Add(flipped)
	f.Fuzz(func(t *testing.T, data []byte) {
		r, seq, err := decodeSlot(data)
		if err != nil {
			if !errors.Is(err, errSlot) {
				t.Fatalf("%v is not errSlot", err)
			}
			return
		}
		again, err := encodeSlot(r, seq)
		if err != nil {
			t.Fatalf("decoded but cannot be encoded: %v", err)
		}
		back, seq2, err := decodeSlot(again)
		if err != nil || seq2 != seq || back.State != r.State || back.Guest != r.Guest || back.Epoch != r.Epoch {
			t.Fatalf("%+v came back as %+v, %v", r, back, err)
		}
	})
}

var _ io.ReaderAt = (*fakeDisk)(nil)

package directio

import (
	"context"
	"errors"
	"io"
	"net"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/uuid"

	"github.com/lmctl/lmctl/dirtymap"
	"github.com/lmctl/lmctl/guest/control"
	"github.com/lmctl/lmctl/guest/workload"
	"github.com/lmctl/lmctl/internal/hypervisor/qemu"
	"github.com/lmctl/lmctl/internal/testenv"
	"github.com/lmctl/lmctl/migrate"
)

const (
	readers  = 16 // direct reads that the guest keeps in flight
	block    = workload.RecordSize
	diskSize = 1 << 20
)

// bed is a guest on the first of two hosts, and its disk.
type bed struct {
	disk        *slowDisk
	here, there *qemu.Driver
	guest       string
	ledger      *ledger
}

// TestReads moves a guest whose disk reads by direct I/O are under way at every
// moment.
func TestReads(t *testing.T) {
	testenv.NeedRoot(t)
	testenv.NeedTracker(t, dirtymap.Probe)
	b := &bed{disk: newSlowDisk(t, diskSize), here: newHost(t), there: newHost(t), ledger: &ledger{}}
	b.guest = startGuest(t, b.here, b.disk)
	b.fill(t)
	t.Run("without drain", b.withoutDrain)
	t.Run("with drain", b.withDrain)
}

// fill has the guest write a record to each block of the disk, so that every
// read brings something of its own, which the guest can tell.
func (b *bed) fill(t *testing.T) {
	t.Helper()
	st := ask(t, b.here, b.guest, control.Request{Do: control.SetDisk, Disk: &control.DiskSetting{Rate: control.Unbounded}})
	for ctx := within(t); st.Disk.Last <= diskSize/block; {
		if err := ctx.Err(); err != nil {
			t.Fatalf("%d records written: %v", st.Disk.Last, err)
		}
		st = ask(t, b.here, b.guest, control.Request{Do: control.GetStatus})
	}
	// The writer finishes what it is at before it stops; a check contends with
	// it for every block. A write queued behind slow reads would not end.
	ask(t, b.here, b.guest, control.Request{Do: control.SetDisk, Disk: &control.DiskSetting{}})
	for last := uint64(0); last != st.Disk.Last; {
		last = st.Disk.Last
		st = ask(t, b.here, b.guest, control.Request{Do: control.CheckAll})
	}
	ask(t, b.here, b.guest, control.Request{Do: control.SetDisk, Disk: &control.DiskSetting{Readers: readers}})
}

// migrate moves the guest as wrap shows it, and returns when both hosts have
// done with it.
func (b *bed) migrate(t *testing.T, options migrate.Options, wrap func(*qemu.Guest) migrate.Guest) (*migrate.Report, error) {
	t.Helper()
	g, err := b.here.Source(b.guest)
	if err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := g.Close(); err != nil {
			t.Error(err)
		}
	}()
	address, stop := serve(t, &migrate.Receiver{
		Name: "host2", Host: b.there, Ledger: b.ledger,
		Undecided: func(migrate.Incoming) { t.Error("the destination did not hear whose the guest is") },
	})
	defer stop()
	sender := &migrate.Sender{
		Host: "host1", Ledger: b.ledger,
		Track: func(p migrate.Process, regions []dirtymap.Region) (migrate.Tracker, error) {
			tracker, err := dirtymap.Attach(p, regions)
			if err != nil {
				return nil, err
			}
			return &readingTracker{Tracker: tracker, t: t, disk: b.disk}, nil
		},
	}
	options.Verify = true
	return sender.Migrate(within(t), migrate.Job{
		ID: uuid.NewString(), Guest: wrap(g), Epoch: 1, Destination: "host2", Options: options,
		Dial: func(ctx context.Context) (net.Conn, error) {
			var d net.Dialer
			return d.DialContext(ctx, "tcp", address)
		},
	})
}

// withoutDrain takes the drain out. The reads that are under way at the first
// scan, which takes their marks, land after the only pass has copied their pages
// and before the last scan, which does not see them.
func (b *bed) withoutDrain(t *testing.T) {
	const forever = 24 * time.Hour
	b.disk.slow(forever)
	// Not all of them, for QEMU may queue some behind others that do not end;
	// the tracker sees to it that there is one at least.
	r, err := b.migrate(t, migrate.Options{MaxPasses: 1}, func(g *qemu.Guest) migrate.Guest {
		return &undrained{Guest: g, disk: b.disk}
	})
	var failed *migrate.Error
	if !errors.As(err, &failed) || r.Result != migrate.Failed || !strings.Contains(r.Error, "pages differ") {
		t.Errorf("without the drain: %s: %v; want pages that differ", r.Result, err)
	}
	if len(r.Passes) != 1 {
		t.Errorf("%d passes, not one", len(r.Passes))
	}
	calls := b.ledger.taken()
	slices.Sort(calls) // the two hosts undo side by side
	if !slices.Equal(calls, []string{"begin", "cancel", "drop", "prepare"}) {
		t.Errorf("the ledgers saw %q", calls)
	}
	if list := b.there.List(); len(list) > 0 {
		t.Errorf("left at the destination: %+v", list)
	}
	b.disk.slow(0)
	healthy(t, b.here, b.guest)
}

// withDrain moves the guest in several passes and loses nothing.
func (b *bed) withDrain(t *testing.T) {
	b.disk.slow(400 * time.Millisecond)
	ask(t, b.here, b.guest, control.Request{Do: control.SetMemory, Memory: &control.MemorySetting{
		Rate: control.Unbounded, WorkingSet: 8 << 20, Pattern: control.Sequential}})
	var seen *drained
	r, err := b.migrate(t, migrate.Options{MaxPasses: 4, DowntimeTarget: time.Nanosecond}, func(g *qemu.Guest) migrate.Guest {
		seen = &drained{Guest: g, t: t, disk: b.disk}
		return seen
	})
	if err != nil || r.Result != migrate.Completed {
		t.Fatalf("%s: %v", r.Result, err)
	}
	if r.RAMBytes == 0 || r.VerifiedPages*migrate.PageSize != r.RAMBytes {
		t.Errorf("%d pages verified of %d bytes", r.VerifiedPages, r.RAMBytes)
	}
	if len(r.Passes) < 3 || len(r.Passes) > 4 || seen.drains != len(r.Passes) || seen.reads < seen.drains {
		t.Errorf("%d passes, %d drains of %d reads", len(r.Passes), seen.drains, seen.reads)
	}
	if calls := b.ledger.taken(); !slices.Equal(calls, []string{"prepare", "begin", "hand over", "accept", "own", "forget"}) {
		t.Errorf("the ledgers saw %q", calls)
	}
	if list := b.here.List(); len(list) > 0 {
		t.Errorf("left at the source: %+v", list)
	}
	// What had been read is in memory, and what is read arrives there too.
	before := ask(t, b.there, b.guest, control.Request{Do: control.GetStatus})
	b.disk.slow(0)
	const again = 4 * readers * 64 // each reader goes over its memory
	ctx := within(t)
	for st := before; st.Disk.Checked < before.Disk.Checked+again; st = ask(t, b.there, b.guest, control.Request{Do: control.GetStatus}) {
		if err := ctx.Err(); err != nil {
			t.Fatalf("the readers stand still: %+v: %v", st.Disk, err)
		}
	}
	healthy(t, b.there, b.guest)
}

// readingTracker sees to it that reads are under way whenever it looks.
type readingTracker struct {
	migrate.Tracker
	t    *testing.T
	disk *slowDisk
}

func (r *readingTracker) Collect(into []*dirtymap.Bitmap) error {
	if err := r.disk.await(within(r.t)); err != nil {
		return err
	}
	return r.Tracker.Collect(into)
}

// undrained is a guest that is not drained. All its reads land when it is
// suspended.
type undrained struct {
	*qemu.Guest
	disk *slowDisk
}

func (g *undrained) Drain(context.Context) error { return nil }

func (g *undrained) Suspend(ctx context.Context, w io.Writer) (time.Time, error) {
	// Reads that come now must not be many: they would fill the same memory
	// again, seen this time.
	g.disk.slow(200 * time.Millisecond)
	g.disk.landAll()
	return g.Guest.Suspend(ctx, w)
}

// drained is a guest that says whether its drain is one.
type drained struct {
	*qemu.Guest
	t             *testing.T
	disk          *slowDisk
	drains, reads int // the reads that the drains had to wait for
}

func (g *drained) Drain(ctx context.Context) error {
	before := g.disk.underWay()
	if err := g.Guest.Drain(ctx); err != nil {
		return err
	}
	after := g.disk.underWay()
	for _, id := range before {
		if slices.Contains(after, id) {
			g.t.Errorf("read %d is still under way after the drain", id)
		}
	}
	g.drains++
	g.reads += len(before)
	return nil
}

func (g *drained) Suspend(ctx context.Context, w io.Writer) (time.Time, error) {
	if err := g.disk.await(ctx); err != nil {
		return time.Time{}, err
	}
	return g.Guest.Suspend(ctx, w)
}

// ledger is that of both hosts, which do not crash here: it knows what it was
// asked.
type ledger struct {
	mu    sync.Mutex
	calls []string
}

func (l *ledger) note(call string) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.calls = append(l.calls, call)
	return nil
}

// taken returns the calls since it was last asked.
func (l *ledger) taken() []string {
	l.mu.Lock()
	defer l.mu.Unlock()
	calls := l.calls
	l.calls = nil
	return calls
}

func (l *ledger) Begin(context.Context, migrate.Handover) error    { return l.note("begin") }
func (l *ledger) HandOver(context.Context, migrate.Handover) error { return l.note("hand over") }
func (l *ledger) Reclaim(context.Context, migrate.Handover) error  { return l.note("reclaim") }
func (l *ledger) Cancel(context.Context, migrate.Handover) error   { return l.note("cancel") }
func (l *ledger) Forget(context.Context, migrate.Handover) error   { return l.note("forget") }
func (l *ledger) Prepare(context.Context, migrate.Handover) error  { return l.note("prepare") }
func (l *ledger) Accept(context.Context, migrate.Handover) error   { return l.note("accept") }
func (l *ledger) Own(context.Context, migrate.Handover) error      { return l.note("own") }
func (l *ledger) Withdraw(context.Context, migrate.Handover) error { return l.note("withdraw") }
func (l *ledger) Drop(context.Context, migrate.Handover) error     { return l.note("drop") }

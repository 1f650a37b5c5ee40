package migrate

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"
)

func TestMigrate(t *testing.T) {
	for _, streams := range []int{1, 3} {
		for _, verify := range []bool{false, true} {
			t.Run(fmt.Sprintf("streams=%d,verify=%v", streams, verify), func(t *testing.T) {
				r := newFakeRun(t)
				r.options.Streams, r.options.Verify = streams, verify
				report, err := r.migrate(context.Background())
				if err != nil {
					t.Fatal(err)
				}
				checkCompleted(t, r, report)
			})
		}
	}
}

func checkCompleted(t *testing.T, r *fakeRun, report *Report) {
	t.Helper()
	r.equalMemory()
	if !bytes.Equal(r.host.shell.loaded, r.guest.state) {
		t.Error("the device state arrived changed")
	}
	if !r.host.shell.resumed || !r.guest.released || r.guest.running || !r.guest.forwarded {
		t.Errorf("shell resumed %v, source released %v and running %v, frames forwarded %v",
			r.host.shell.resumed, r.guest.released, r.guest.running, r.guest.forwarded)
	}
	want := []string{"prepare", "begin", "hand over", "accept", "own", "forget"}
	if !slices.Equal(r.ledger.calls, want) {
		t.Errorf("ledger saw %q, want %q", r.ledger.calls, want)
	}
	if r.guest.tracker.closed != 1 {
		t.Errorf("tracker closed %d times", r.guest.tracker.closed)
	}
	total := int64(3017)
	switch {
	case report.Result != Completed || report.SwitchoverReason == "":
		t.Errorf("result %s, switchover for %q", report.Result, report.SwitchoverReason)
	case len(report.Passes) < 1 || len(report.Passes) > 3:
		t.Errorf("%d passes", len(report.Passes))
	case report.RAMBytes != total*PageSize:
		t.Errorf("%d bytes of memory", report.RAMBytes)
	case report.Passes[0].Pages > total*3/4+6 || report.Passes[0].ZeroPages == 0:
		t.Errorf("pass 1 sent %d pages, %d zero: holes or zero pages were not left out", report.Passes[0].Pages, report.Passes[0].ZeroPages)
	case report.Downtime <= 0 || report.Total < report.Downtime || report.DowntimeParts.StateBytes != int64(len(r.guest.state)):
		t.Errorf("times %+v", report)
	case report.Announced != 2:
		t.Errorf("%d addresses announced", report.Announced)
	}
	if want := total; r.options.Verify && report.VerifiedPages != want || !r.options.Verify && report.VerifiedPages != 0 {
		t.Errorf("%d pages verified", report.VerifiedPages)
	}
	var sent int64
	for i, p := range report.Passes {
		if p.N != i+1 {
			t.Errorf("pass %d is numbered %d", i+1, p.N)
		}
		sent += p.Bytes
	}
	if report.BytesSent < sent {
		t.Errorf("%d bytes sent in all, %d in the passes", report.BytesSent, sent)
	}
}

// TestProgressNeverRunsBackwards watches a migration.
func TestProgressNeverRunsBackwards(t *testing.T) {
	r := newFakeRun(t)
	var seen []Progress
	r.tune = func(_ *Sender, j *Job, _ *Receiver) {
		j.Observe = func(p Progress) { seen = append(seen, p) } // the engine keeps its calls apart
	}
	if _, err := r.migrate(context.Background()); err != nil {
		t.Fatal(err)
	}
	if len(seen) < 10 || seen[len(seen)-1].State != SourceDone {
		t.Fatalf("%d snapshots, the last %+v", len(seen), seen[len(seen)-1])
	}
	for i := 1; i < len(seen); i++ {
		a, b := seen[i-1], seen[i]
		if b.BytesSent < a.BytesSent || len(b.Passes) < len(a.Passes) || b.Pass < a.Pass ||
			b.Pass == a.Pass && (b.CopiedPages < a.CopiedPages || b.PassPages != a.PassPages) || b.CopiedPages > b.PassPages {
			t.Errorf("%+v after %+v", b, a)
		}
	}
}

// TestGuestGoesOnAtTheSource fails migrations before the commit, each in its
// own way: whatever happens, the guest runs on at the source and nothing of it
// is left at the destination.
func TestGuestGoesOnAtTheSource(t *testing.T) {
	boom := errors.New("boom")
	for name, c := range map[string]struct {
		arrange func(*fakeRun, context.CancelFunc)
		result  Result
		message string
		noShell bool
	}{
		"not movable": {func(r *fakeRun, _ context.CancelFunc) {
			r.guest.refuse = &Refusal{Reasons: []string{"device vfio-pci"}}
		}, Refused, "vfio-pci", true},
		"refused": {func(r *fakeRun, _ context.CancelFunc) {
			r.host.err = &Refusal{Reasons: []string{"no bridge br7", "no disk"}}
		}, Refused, "no bridge br7; no disk", true},
		"same host": {func(r *fakeRun, _ context.CancelFunc) {
			r.tune = func(s *Sender, j *Job, _ *Receiver) { j.Destination = "host1" }
		}, Refused, `on host "host1" already`, true},
		"wrong host": {func(r *fakeRun, _ context.CancelFunc) {
			r.tune = func(_ *Sender, _ *Job, recv *Receiver) { recv.Name = "host3" }
		}, Refused, `this is host "host3"`, true},
		"ledger at the destination": {func(r *fakeRun, _ context.CancelFunc) { r.ledger.fail["prepare"] = boom }, Refused, "boom", false},
		"save":                      {func(r *fakeRun, _ context.CancelFunc) { r.guest.saveErr = boom }, Failed, "save device state: boom", false},
		"load":                      {func(r *fakeRun, _ context.CancelFunc) { r.host.shell.loadErr = boom }, Failed, "load device state: boom", false},
		"lost write":                {func(r *fakeRun, _ context.CancelFunc) { r.options.MaxPasses = 1; r.guest.forgetWrites() }, Failed, "pages differ at the destination", false},
		"no record":                 {func(r *fakeRun, _ context.CancelFunc) { r.ledger.fail["hand over"] = ErrNotHandedOver }, Failed, "not handed over", false},
		"cancelled": {func(r *fakeRun, cancel context.CancelFunc) {
			r.ledger.before = func(call string) {
				if call == "begin" {
					cancel()
				}
			}
		}, Cancelled, "context canceled", false},
		"cut while copying": {func(r *fakeRun, _ context.CancelFunc) {
			r.tune = func(_ *Sender, j *Job, _ *Receiver) {
				j.Observe = func(p Progress) {
					if p.State == SourceCopying {
						r.cut()
					}
				}
			}
		}, Failed, "", false},
		"shell dies": {func(r *fakeRun, _ context.CancelFunc) {
			r.ledger.before = func(call string) {
				if call == "begin" {
					close(r.host.shell.lost)
				}
			}
		}, Failed, "process has ended", false},
	} {
		t.Run(name, func(t *testing.T) {
			r := newFakeRun(t)
			ctx, cancel := context.WithCancel(context.Background())
			defer cancel()
			c.arrange(r, cancel)
			_, err := r.migrate(ctx)
			if err == nil {
				t.Fatal("the migration went through")
			}
			if err.Result != c.result || !strings.Contains(err.Error(), c.message) {
				t.Errorf("ended as %s with %q, want %s with %q", err.Result, err, c.result, c.message)
			}
			if !r.guest.running || r.guest.released || r.host.shell.resumed {
				t.Errorf("source running %v, released %v; shell resumed %v", r.guest.running, r.guest.released, r.host.shell.resumed)
			}
			if r.host.shell.destroyed == c.noShell {
				t.Errorf("shell destroyed: %v", r.host.shell.destroyed)
			}
			if r.ledger.has("begin") && !r.ledger.has("cancel") {
				t.Errorf("ledger saw %q", r.ledger.calls)
			}
		})
	}
}

// TestCutAfterReady breaks the link once the destination is ready: before the
// record the guest goes on at the source, after it the guest is in doubt, and
// in both cases the destination asks before it does anything.
func TestCutAfterReady(t *testing.T) {
	for _, c := range []struct {
		name   string
		fail   error // of HandOver
		result Result
	}{
		{"record not written", ErrNotHandedOver, Failed},
		{"record written", nil, InDoubt},
		{"record perhaps written", errors.New("input/output error"), InDoubt},
	} {
		t.Run(c.name, func(t *testing.T) {
			r := newFakeRun(t)
			r.ledger.fail["hand over"] = c.fail
			r.ledger.before = func(call string) {
				if call == "hand over" {
					r.cut()
				}
			}
			_, err := r.migrate(context.Background())
			if err == nil || err.Result != c.result {
				t.Fatalf("got %v, want %s", err, c.result)
			}
			in := <-r.undecided
			if in.Handover.Epoch != 7 || r.host.shell.resumed || r.host.shell.destroyed {
				t.Errorf("handover %+v, shell resumed %v, destroyed %v", in.Handover, r.host.shell.resumed, r.host.shell.destroyed)
			}
			if running := c.result == Failed; r.guest.running != running || r.guest.released {
				t.Errorf("source running %v, released %v", r.guest.running, r.guest.released)
			}
			finishOrWithdraw(t, r, in, c.result == InDoubt)
		})
	}
}

// finishOrWithdraw does what the owner of a Receiver does with an undecided
// guest once it has read the source's record.
func finishOrWithdraw(t *testing.T, r *fakeRun, in Incoming, handedOver bool) {
	t.Helper()
	recv := &Receiver{Name: "host2", Ledger: fakeDestLedger{r.ledger}}
	if handedOver {
		if err := recv.Finish(context.Background(), in); err != nil {
			t.Fatal(err)
		}
		r.equalMemory()
		if !r.host.shell.resumed || !r.ledger.has("own") {
			t.Error("the guest was not started")
		}
		return
	}
	if err := recv.Withdraw(context.Background(), in); err != nil {
		t.Fatal(err)
	}
	if r.host.shell.resumed || !r.host.shell.destroyed || !r.ledger.has("withdraw") {
		t.Error("the shell was not withdrawn")
	}
}

// TestStartFailsAtTheDestination starts the vCPUs with an error that does not
// say that none ran: the guest is the destination's, and the account says so.
func TestStartFailsAtTheDestination(t *testing.T) {
	r := newFakeRun(t)
	r.host.shell.resumeErr = errors.New("no answer to cont")
	report, err := r.migrate(context.Background())
	if err != nil || report.Result != Completed || !strings.Contains(report.Error, "no answer to cont") || report.Downtime != 0 {
		t.Fatalf("%v, report %+v", err, report)
	}
	if !r.guest.released || r.guest.running || !r.ledger.has("own") || !r.ledger.has("forget") {
		t.Errorf("source released %v, running %v, ledger %q", r.guest.released, r.guest.running, r.ledger.calls)
	}
}

// TestTooMuchIsLeft does not stop a guest whose rest would keep it stopped for
// longer than any switchover may take.
func TestTooMuchIsLeft(t *testing.T) {
	m := &source{left: PassOutcome{DirtyAfter: 1 << 20, Speed: 30_000}}
	if err := m.fits(); err == nil || !strings.Contains(err.Error(), "4096 MiB") {
		t.Errorf("got %v", err)
	}
	m.left.DirtyAfter = 100_000
	if err := m.fits(); err != nil {
		t.Error(err)
	}
}

// TestWithdrawAfterCommit starts no vCPU at the destination: the source takes
// the guest back, although it had committed.
func TestWithdrawAfterCommit(t *testing.T) {
	r := newFakeRun(t)
	r.host.shell.resumeErr = fmt.Errorf("no lock on the disk: %w", ErrNotStarted)
	_, err := r.migrate(context.Background())
	if err == nil || err.Result != Failed || !strings.Contains(err.Error(), "no lock on the disk") {
		t.Fatalf("got %v", err)
	}
	if !r.guest.running || r.guest.released || !r.host.shell.destroyed {
		t.Errorf("source running %v, released %v, shell destroyed %v", r.guest.running, r.guest.released, r.host.shell.destroyed)
	}
	want := []string{"prepare", "begin", "hand over", "accept", "withdraw", "reclaim"}
	if !slices.Equal(r.ledger.calls, want) {
		t.Errorf("ledger saw %q, want %q", r.ledger.calls, want)
	}
}

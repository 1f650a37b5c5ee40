package bench

import (
	"context"
	"errors"
	"fmt"
	"io"
	"slices"
	"time"

	"github.com/lmctl/lmctl/guest/linux"
	"github.com/lmctl/lmctl/internal/lab"
)

// Options say what to run.
type Options struct {
	Runs       int
	Contenders []Contender
	Workloads  []Workload
	Link       Link
	Version    string // of lmctl
	// Boot finds what Linux guests boot from; it is called when one is needed.
	Boot func(context.Context) (linux.Boot, error)
	// Log is told what is being done, a line at a time.
	Log io.Writer
}

const (
	bootLimit  = 2 * time.Minute  // for a guest to boot
	checkLimit = 20 * time.Second // for a guest's verdict on itself
)

// Run moves a guest of each workload Runs times with each contender, the
// contenders in turn, in a lab with agents on at least two hosts. Every second
// run takes them in the opposite order: those that share a guest, one of whom
// brings it back from where the other has taken it, go either way alike, and
// where they are two, each follows itself as often as the other.
//
// What Run leaves in the lab when it fails goes with the lab. An error is about
// the measuring: a migration that failed, and a guest that is not healthy, are
// in the report.
func Run(ctx context.Context, l *lab.Lab, o Options) (_ *Report, err error) {
	b, err := newBed(ctx, l, o.Boot)
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, b.close()) }()
	machine, err := describeMachine(ctx, l)
	if err != nil {
		return nil, err
	}
	r := &Report{Version: o.Version, Started: time.Now(), Machine: machine, Link: o.Link.Name, Runs: o.Runs, Hypervisor: string(l.Hypervisor())}
	for _, w := range o.Workloads {
		results, err := b.workload(ctx, o, w)
		if err != nil {
			return nil, fmt.Errorf("bench: %s: %w", w.Name, err)
		}
		r.Results = append(r.Results, results...)
	}
	r.Took = time.Since(r.Started)
	r.compare(o.Workloads)
	return r, nil
}

// held is a keeper's guest of one workload.
type held struct {
	*keeper
	subject     subject // nil until it is needed
	counter     int64   // where its clock is
	mover       string  // the contender that has moved it last
	turns       int     // how many times a guest was to be moved
	accelerator string
}

// workload runs all contenders on one workload.
func (b *bed) workload(ctx context.Context, o Options, w Workload) (results []Result, err error) {
	guests := make(map[*keeper]*held)
	defer func() {
		for _, h := range guests {
			err = errors.Join(err, h.close(context.WithoutCancel(ctx)))
		}
	}()
	for _, c := range o.Contenders {
		guests[c.keeper] = &held{keeper: c.keeper}
		results = append(results, Result{
			Workload: w.Name, WorkloadTitle: w.Title, Memory: w.Memory, Contender: c.Name, ContenderTitle: c.Title,
		})
	}
	for run := 1; run <= o.Runs; run++ {
		for _, i := range order(run, len(o.Contenders)) {
			c := o.Contenders[i]
			h := guests[c.keeper]
			sample, err := b.turn(ctx, w, c, h)
			if err != nil {
				return nil, fmt.Errorf("%s: %w", c.Name, err)
			}
			sample.Run = run
			results[i].Accelerator = h.accelerator
			results[i].Samples = append(results[i].Samples, sample)
			fmt.Fprintf(o.Log, "%-12s  %-15s %2d/%d  %s\n", w.Name, c.Name, run, o.Runs, sample.line())
		}
	}
	for i := range results {
		results[i].sum()
	}
	return results, nil
}

// order is the order of n contenders in a run.
func order(run, n int) []int {
	list := make([]int, n)
	for i := range list {
		list[i] = i
	}
	if run%2 == 0 {
		slices.Reverse(list)
	}
	return list
}

// turn is one contender's one migration.
func (b *bed) turn(ctx context.Context, w Workload, c Contender, h *held) (Sample, error) {
	defer func() { h.turns++ }()
	if h.subject == nil {
		if err := b.start(ctx, w, h); err != nil {
			return Sample{}, err
		}
	} else if err := h.subject.resume(ctx); err != nil {
		return Sample{}, err
	}
	sample, err := b.measure(ctx, h.subject, c, h.counter)
	sample.After, h.mover = h.mover, c.Name
	var failed *moveError
	switch {
	case ctx.Err() != nil:
		return Sample{}, ctx.Err()
	case errors.As(err, &failed):
		sample.Error = oneLine(err)
	case err != nil:
		return Sample{}, err
	default:
		check, cancel := context.WithTimeout(ctx, checkLimit)
		defer cancel()
		err := w.program.check(check, h.subject.place())
		if sample.Healthy = err == nil; !sample.Healthy {
			sample.Problem = oneLine(err)
		}
	}
	if sample.Healthy {
		return sample, h.subject.pause(ctx)
	}
	// What its memory is like now is nobody's guest.
	return sample, h.close(ctx)
}

// start boots a guest, where the one before it would be.
func (b *bed) start(ctx context.Context, w Workload, h *held) error {
	name := w.Name + "-" + h.name
	s, err := h.start(ctx, b, name, w, h.turns%2)
	if err != nil {
		return err
	}
	h.subject, h.mover = s, ""
	boot, cancel := context.WithTimeout(ctx, bootLimit)
	defer cancel()
	p := s.place()
	h.accelerator = p.accelerator
	h.counter, err = w.program.boot(boot, p, w.Memory)
	return err
}

// close removes the guest, if there is one.
func (h *held) close(ctx context.Context) error {
	s := h.subject
	if s == nil {
		return nil
	}
	h.subject = nil
	return s.close(ctx)
}

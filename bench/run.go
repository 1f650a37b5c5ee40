package bench

import (
	"context"
	"errors"
	"fmt"
	"io"
	"time"

	"github.com/google/uuid"

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

// bootLimit is how long a guest may take to boot.
const bootLimit = 2 * time.Minute

// Run moves a guest of each workload Runs times with each contender, the
// contenders in turn, in a lab with agents on at least two hosts. What it leaves
// in the lab when it fails goes with the lab. An error is about the measuring: a
// migration that failed, and a guest that is not healthy, are in the report.
func Run(ctx context.Context, l *lab.Lab, o Options) (_ *Report, err error) {
	b, err := newBed(ctx, l, o.Boot)
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, b.close()) }()
	machine, err := describeMachine(ctx)
	if err != nil {
		return nil, err
	}
	r := &Report{Version: o.Version, Started: time.Now(), Machine: machine, Link: o.Link.Name, Runs: o.Runs}
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

// entrant is a contender with its guest.
type entrant struct {
	Contender
	subject subject // nil until it is needed
	counter int64
	result  Result
}

// workload runs all contenders on one workload.
func (b *bed) workload(ctx context.Context, o Options, w Workload) (results []Result, err error) {
	var entrants []*entrant
	defer func() {
		for _, e := range entrants {
			if e.subject != nil {
				err = errors.Join(err, e.subject.close(context.WithoutCancel(ctx)))
			}
		}
	}()
	for _, c := range o.Contenders {
		if c.IdleOnly && !w.Idle {
			continue
		}
		entrants = append(entrants, &entrant{Contender: c, result: Result{
			Workload: w.Name, WorkloadTitle: w.Title, Memory: w.Memory, Contender: c.Name, ContenderTitle: c.Title,
		}})
	}
	for run := 1; run <= o.Runs; run++ {
		for _, e := range entrants {
			if err := b.turn(ctx, w, e, run); err != nil {
				return nil, fmt.Errorf("%s: %w", e.Name, err)
			}
			fmt.Fprintf(o.Log, "%-12s  %-16s %2d/%d  %s\n", w.Name, e.Name, run, o.Runs, e.result.Samples[run-1].line())
		}
	}
	for _, e := range entrants {
		e.result.sum()
		results = append(results, e.result)
	}
	return results, nil
}

// turn is one contender's one migration.
func (b *bed) turn(ctx context.Context, w Workload, e *entrant, run int) error {
	if e.subject == nil {
		if err := b.start(ctx, w, e); err != nil {
			return err
		}
	} else if err := e.subject.resume(ctx); err != nil {
		return err
	}
	sample, err := b.measure(ctx, e.subject, e.counter)
	sample.Run = run
	var failed *moveError
	switch {
	case errors.As(err, &failed) && ctx.Err() == nil:
		sample.Error = oneLine(err)
	case err != nil:
		return err
	default:
		if err := w.program.check(ctx, e.subject.place()); err != nil {
			sample.Problem = oneLine(err)
		} else {
			sample.Healthy = true
		}
	}
	if ctx.Err() != nil {
		return ctx.Err()
	}
	e.result.Samples = append(e.result.Samples, sample)
	if sample.Healthy {
		return e.subject.pause(ctx)
	}
	// What its memory is like now is nobody's guest.
	s := e.subject
	e.subject = nil
	return s.close(ctx)
}

// start boots a guest for a contender.
func (b *bed) start(ctx context.Context, w Workload, e *entrant) error {
	name := w.Name + "-" + e.Name
	def, err := w.program.define(b, name, w.Memory)
	if err != nil {
		return err
	}
	def.UUID = uuid.NewString()
	text, err := def.YAML()
	if err != nil {
		return err
	}
	if e.subject, err = e.Contender.start(ctx, b, name, text); err != nil {
		e.subject = nil
		return err
	}
	e.result.Guests++
	boot, cancel := context.WithTimeout(ctx, bootLimit)
	defer cancel()
	p := e.subject.place()
	e.result.Accelerator = p.accelerator
	e.counter, err = w.program.boot(boot, p, w.Memory)
	return err
}

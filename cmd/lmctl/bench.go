package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"sync"
	"syscall"

	"github.com/spf13/cobra"

	"github.com/lmctl/lmctl/bench"
	"github.com/lmctl/lmctl/guest/linux"
	"github.com/lmctl/lmctl/internal/lab"
)

const benchLong = `Measures live migrations in a lab of its own: lmctl's and those of others, in
turn, with the same guests, and from outside in the same way. It needs root, and
a machine that has nothing else to do.`

// benchDir is the folder of the bench's lab, unless it is told another.
const benchDir = "/var/lib/lmctl/bench"

type benchFlags struct {
	hypervisor lab.Hypervisor
	runs       int
	contenders []string
	workloads  []string
	smallest   bool
	each       bool // print each run too
	out        string
	dir        string
}

func newBenchCommand(o *options) *cobra.Command {
	cmd := &cobra.Command{
		Use: "bench", Short: "Measure migrations: lmctl's, QEMU's own and virsh's", Long: benchLong,
		Args: noSuchCommand, RunE: showHelp,
	}
	cmd.AddCommand(newBenchQuickCommand(o), newBenchMemoryCommand(o), newBenchLibvirtCommand(o), newBenchListCommand(o))
	return cmd
}

func newBenchQuickCommand(o *options) *cobra.Command {
	f := benchFlags{hypervisor: lab.QEMU, runs: 5, workloads: []string{"idle-linux", "writer"}, contenders: []string{"lmctl", "qemu", "qemu-unlimited", "floor"}}
	cmd := &cobra.Command{
		Use: "quick", Short: "An idle guest and one that writes without pause, within 3 minutes",
		Long:    benchLong + "\n\nlmctl bench list says what there is to measure.",
		Example: "  lmctl bench quick\n  lmctl bench quick --runs 10 --workloads idle-256M --contenders lmctl,floor\n  lmctl bench quick --json --out bench.json",
		Args:    takes(),
		RunE:    func(cmd *cobra.Command, _ []string) error { return o.bench(cmd.Context(), &f) },
	}
	f.register(cmd)
	f.registerSmallest(cmd)
	return cmd
}

func newBenchMemoryCommand(o *options) *cobra.Command {
	f := benchFlags{hypervisor: lab.QEMU, runs: 10, workloads: []string{"idle-256M", "idle-4G"}, contenders: []string{"lmctl", "floor"}}
	cmd := &cobra.Command{
		Use: "memory", Short: "Whether the downtime grows with an idle guest's memory", Long: benchLong, Args: takes(),
		RunE: func(cmd *cobra.Command, _ []string) error { return o.bench(cmd.Context(), &f) },
	}
	f.register(cmd)
	return cmd
}

func (f *benchFlags) register(cmd *cobra.Command) {
	flags := cmd.Flags()
	flags.IntVar(&f.runs, "runs", f.runs, "migrations of each guest with each contender")
	flags.StringSliceVar(&f.contenders, "contenders", f.contenders, "who moves the guests")
	flags.StringSliceVar(&f.workloads, "workloads", f.workloads, "what guests are moved")
	flags.StringVar(&f.out, "out", "", "write the JSON with all samples to this file too")
	flags.StringVar(&f.dir, "dir", benchDir, "folder for the lab, which is removed at the end")
}

func (f *benchFlags) registerSmallest(cmd *cobra.Command) {
	cmd.Flags().BoolVar(&f.smallest, "smallest", false, "one run of a small guest with every contender, to see that all of it works")
}

func newBenchListCommand(o *options) *cobra.Command {
	return &cobra.Command{
		Use: "list", Short: "List what the bench can measure", Args: takes(),
		RunE: func(*cobra.Command, []string) error { return o.benchList() },
	}
}

func (o *options) benchList() error {
	type entry struct {
		Hypervisor lab.Hypervisor `json:"hypervisor"`
		Kind       string         `json:"kind"`
		Name       string         `json:"name"`
		Title      string         `json:"title"`
	}
	var list []entry
	for _, h := range []lab.Hypervisor{lab.QEMU, lab.Libvirt} {
		for _, c := range bench.Contenders(h) {
			list = append(list, entry{h, "contender", c.Name, c.Title})
		}
		for _, w := range bench.Workloads(h) {
			list = append(list, entry{h, "workload", w.Name, w.Title + ", " + size(w.Memory)})
		}
		for _, l := range bench.Links() {
			list = append(list, entry{h, "link", l.Name, l.Title})
		}
	}
	if o.json {
		return printJSON(o.out, list)
	}
	var rows [][]string
	for _, e := range list {
		rows = append(rows, []string{string(e.Hypervisor), e.Kind, e.Name, e.Title})
	}
	return printTable(o.out, "HYPERVISOR KIND NAME TITLE", rows)
}

// plan is what the flags ask for.
func (f *benchFlags) plan() (bench.Options, error) {
	contenders, workloads := bench.Contenders(f.hypervisor), bench.Workloads(f.hypervisor)
	p := bench.Options{Runs: f.runs, Version: buildVersion(), Link: bench.Links()[0]}
	if f.smallest {
		p.Runs, f.workloads, f.contenders = 1, []string{bench.Smallest}, nil
		for _, c := range contenders {
			f.contenders = append(f.contenders, c.Name)
		}
	}
	if p.Runs < 1 {
		return p, usagef("--runs %d: one is the least", f.runs)
	}
	var unknown string
	p.Contenders, unknown = bench.Named(contenders, func(c bench.Contender) string { return c.Name }, f.contenders)
	if unknown != "" {
		return p, usagef("no contender %q; see lmctl bench list", unknown)
	}
	p.Workloads, unknown = bench.Named(workloads, func(w bench.Workload) string { return w.Name }, f.workloads)
	if unknown != "" {
		return p, usagef("no workload %q; see lmctl bench list", unknown)
	}
	if len(p.Contenders) == 0 || len(p.Workloads) == 0 {
		return p, usagef("nothing to measure: name contenders and workloads; see lmctl bench list")
	}
	return p, nil
}

func (o *options) bench(ctx context.Context, f *benchFlags) (err error) {
	p, err := f.plan()
	if err != nil {
		return err
	}
	var out io.WriteCloser
	if f.out != "" { // known to be writable before minutes are spent
		if out, err = os.Create(f.out); err != nil {
			return err
		}
		defer func() { err = errors.Join(err, out.Close()) }()
	}
	ctx, stop := signal.NotifyContext(ctx, syscall.SIGINT, syscall.SIGTERM)
	defer stop()
	l, end, err := lab.Fresh(ctx, lab.Options{Dir: f.dir, Hosts: 2, Hypervisor: f.hypervisor})
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, end()) }()
	p.Log = o.err
	p.Boot = onceBoot(func(what string) { fmt.Fprintln(o.err, what) })
	r, err := bench.Run(ctx, l, p)
	if err != nil {
		return err
	}
	if out != nil {
		if err := printJSON(out, r); err != nil {
			return err
		}
	}
	if o.json {
		return printJSON(o.out, r)
	}
	fmt.Fprintln(o.err)
	if err := r.WriteTable(o.out); err != nil || !f.each {
		return err
	}
	return r.WriteRuns(o.out)
}

// onceBoot finds what Linux guests boot from when it is first asked.
func onceBoot(say func(string)) func(context.Context) (linux.Boot, error) {
	var once sync.Once
	var boot linux.Boot
	var err error
	return func(ctx context.Context) (linux.Boot, error) {
		once.Do(func() { boot, err = lab.BootFiles(ctx, say) })
		return boot, err
	}
}

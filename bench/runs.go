package bench

import (
	"cmp"
	"fmt"
	"io"
	"slices"
	"text/tabwriter"
	"time"

	"github.com/lmctl/lmctl/bench/stats"
)

// turned is a sample with whose it is.
type turned struct {
	Sample
	contender string
}

// WriteRuns writes every migration for people, in the order in which they were,
// and what the contenders say of where their downtimes went.
func (r *Report) WriteRuns(w io.Writer) error {
	var names []string
	of := make(map[string][]turned)
	for _, x := range r.Results {
		if of[x.Workload] == nil {
			names = append(names, x.Workload)
		}
		for _, s := range x.Samples {
			of[x.Workload] = append(of[x.Workload], turned{s, x.Contender})
		}
	}
	for _, name := range names {
		list := of[name]
		slices.SortStableFunc(list, func(a, b turned) int { return a.Started.Compare(b.Started) })
		fmt.Fprintf(w, "\n%s, each run\n", name)
		if err := writeTurns(w, list); err != nil {
			return err
		}
	}
	return r.writeParts(w)
}

const runsLegend = `  downtime: the longest time in which the guest did not go on; switchover: the longest after which it went on at
  the other host; own: by the contender's own account; quiet: the longest just before, without a migration; late:
  the longest between two looks
`

func writeTurns(w io.Writer, list []turned) error {
	t := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	fmt.Fprintln(t, "  run\tcontender\tfrom\tto\tdowntime\tswitchover\town\tpasses\ttotal\tquiet\tlate\t")
	for _, s := range list {
		fmt.Fprintf(t, "  %d\t%s\t%s\t%s\t", s.Run, s.contender, s.Source, s.Destination)
		if s.Error != "" {
			fmt.Fprintln(t, "failed: "+s.Error)
			continue
		}
		fmt.Fprintf(t, "%s\t%s\t%s\t%s\t%s\t%s\t%s\t", ms(s.Downtime), ms(s.Switchover),
			told(s.Own.Downtime, ms), told(s.Own.Passes, func(n int) string { return fmt.Sprint(n) }), brief(s.Total), ms(s.Quiet), ms(s.Late))
		if !s.Healthy {
			fmt.Fprint(t, "NOT HEALTHY: "+s.Problem)
		}
		fmt.Fprintln(t)
	}
	if err := t.Flush(); err != nil {
		return err
	}
	_, err := fmt.Fprint(w, runsLegend)
	return err
}

// told shows what a contender has told.
func told[T cmp.Ordered](v T, show func(T) string) string {
	var nothing T
	if v == nothing {
		return "-"
	}
	return show(v)
}

// writeParts writes the medians of the parts of downtimes.
func (r *Report) writeParts(w io.Writer) error {
	for _, x := range r.Results {
		parts := x.parts()
		if len(parts) == 0 {
			continue
		}
		fmt.Fprintf(w, "\n%s, %s's own account: medians of the parts, which may overlap\n ", x.Workload, x.Contender)
		for i, p := range parts {
			if i > 0 {
				fmt.Fprint(w, ",")
			}
			fmt.Fprintf(w, " %s %s", p.Name, ms(p.Took))
		}
		if _, err := fmt.Fprintln(w); err != nil {
			return err
		}
	}
	return nil
}

// parts are the medians of what the samples' parts took, in their order.
func (r *Result) parts() []Part {
	var names []string
	took := make(map[string][]time.Duration)
	for _, s := range r.Samples {
		for _, p := range s.Own.Parts {
			if took[p.Name] == nil {
				names = append(names, p.Name)
			}
			took[p.Name] = append(took[p.Name], p.Took)
		}
	}
	parts := make([]Part, 0, len(names))
	for _, name := range names {
		parts = append(parts, Part{name, stats.Of(took[name]).Median})
	}
	return parts
}

package bench

import (
	"fmt"
	"io"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/dustin/go-humanize"

	"github.com/lmctl/lmctl/bench/stats"
)

// WriteTable writes the report for people.
func (r *Report) WriteTable(w io.Writer) error {
	m := r.Machine
	how := "the CPU virtualizes"
	if !m.Virtualizes {
		how = "the CPU does not virtualize: Linux under TCG, flat guests on an emulating KVM"
	}
	hypervisor := "QEMU " + m.QEMU
	if m.Libvirt != "" {
		hypervisor = "libvirt " + m.Libvirt + ", " + hypervisor
	}
	fmt.Fprintf(w, "lmctl %s, %s, Linux %s\n%s, %d cores, %s; %s\n%d runs each, in turn, over %s; %s in all\n",
		r.Version, hypervisor, m.Kernel, m.CPU, m.Cores, humanize.IBytes(uint64(m.MemoryBytes)), how,
		r.Runs, r.Link, brief(r.Took))
	workload := ""
	t := tabwriter.NewWriter(w, 0, 0, 3, ' ', tabwriter.AlignRight)
	for _, x := range r.Results {
		if x.Workload != workload {
			workload = x.Workload
			if err := t.Flush(); err != nil {
				return err
			}
			fmt.Fprintf(w, "\n%s: %s, %s, %s\n", x.Workload, x.WorkloadTitle, humanize.IBytes(uint64(x.Memory)), x.Accelerator)
			fmt.Fprintln(t, "\tdowntime\tmin\tmax\town\ttotal\tmin\tmax\tsent\thealthy\t")
		}
		fmt.Fprintln(t, strings.Join(x.row(), "\t")+"\t")
	}
	if err := t.Flush(); err != nil {
		return err
	}
	return r.writeRest(w)
}

// row is a result as columns.
func (r *Result) row() []string {
	done := len(r.Samples) - r.Failed
	row := []string{r.Contender}
	row = append(row, cells(r.Downtime, ms)...)
	row = append(row, cells(r.Own, ms)[0])
	row = append(row, cells(r.Total, brief)...)
	sent := "-"
	if r.Bytes.N > 0 {
		sent = humanize.IBytes(uint64(max(r.Bytes.Median, 0)))
	}
	row = append(row, sent, fmt.Sprintf("%d of %d", r.Healthy, done))
	if r.Failed > 0 {
		row[len(row)-1] += fmt.Sprintf(", %d failed", r.Failed)
	}
	return row
}

// cells are median, least and most.
func cells[T stats.Number](s stats.Summary[T], show func(T) string) []string {
	if s.N == 0 {
		return []string{"-", "-", "-"}
	}
	return []string{show(s.Median), show(s.Min), show(s.Max)}
}

// writeRest writes the comparisons, and what the names mean.
func (r *Report) writeRest(w io.Writer) error {
	t := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	if len(r.Comparisons) > 0 {
		fmt.Fprintln(t, "\nMedian downtimes compared")
	}
	for _, c := range r.Comparisons {
		wanted := ""
		if c.Target > 0 {
			wanted = fmt.Sprintf("\t(wanted: at most %.1f)", c.Target)
		}
		fmt.Fprintf(t, "  %s\t%s : %s\t= %.2f%s\n", c.What, ms(c.A), ms(c.B), c.Ratio, wanted)
	}
	if err := t.Flush(); err != nil {
		return err
	}
	fmt.Fprintln(t, "\nContenders")
	told := make(map[string]bool)
	for _, x := range r.Results {
		if !told[x.Contender] {
			told[x.Contender] = true
			fmt.Fprintf(t, "  %s\t%s\n", x.Contender, x.ContenderTitle)
		}
	}
	return t.Flush()
}

// ms is a duration in milliseconds, as downtimes are compared.
func ms(d time.Duration) string { return fmt.Sprintf("%.1f ms", float64(d)/float64(time.Millisecond)) }

// brief is a duration with the digits that matter.
func brief(d time.Duration) string {
	if d >= 10*time.Second {
		return fmt.Sprintf("%.0f s", d.Seconds())
	}
	return fmt.Sprintf("%.2f s", d.Seconds())
}

package bench

import (
	"fmt"
	"maps"
	"slices"
	"time"

	"github.com/dustin/go-humanize"

	"github.com/lmctl/lmctl/bench/stats"
	"github.com/lmctl/lmctl/internal/lab"
)

// Report is all that was measured. Times are nanoseconds in JSON.
type Report struct {
	Version     string        `json:"version"` // of lmctl
	Started     time.Time     `json:"started"`
	Took        time.Duration `json:"took_ns"`
	Machine     Machine       `json:"machine"`
	Link        string        `json:"link"`
	Hypervisor  string        `json:"hypervisor"` // qemu: run by the agents, or by the bench; libvirt
	Runs        int           `json:"runs"`
	Results     []Result      `json:"results"`
	Comparisons []Comparison  `json:"comparisons"`
}

// Result is one contender on one workload.
type Result struct {
	Workload       string                       `json:"workload"`
	WorkloadTitle  string                       `json:"workload_title"`
	Memory         int64                        `json:"memory_bytes"`
	Accelerator    string                       `json:"accelerator"`
	Contender      string                       `json:"contender"`
	ContenderTitle string                       `json:"contender_title"`
	Failed         int                          `json:"failed"`  // migrations that did not come to their end
	Healthy        int                          `json:"healthy"` // guests that were so afterwards
	Downtime       stats.Summary[time.Duration] `json:"downtime_ns"`
	Switchover     stats.Summary[time.Duration] `json:"switchover_ns"`
	Own            stats.Summary[time.Duration] `json:"own_downtime_ns"` // by the contender's own account
	Total          stats.Summary[time.Duration] `json:"total_ns"`
	Bytes          stats.Summary[int64]         `json:"bytes"`
	Samples        []Sample                     `json:"samples"`
}

// Comparison sets two medians of downtimes against each other.
type Comparison struct {
	What  string        `json:"what"`
	A     time.Duration `json:"a_ns"`
	B     time.Duration `json:"b_ns"`
	Ratio float64       `json:"ratio"` // A to B
	// Target is what Ratio is to be at most; 0 if nothing is asked of it.
	Target float64 `json:"target,omitempty"`
}

// sum sums up the samples of the migrations that came to their end.
func (r *Result) sum() {
	var downtimes, switchovers, own, totals []time.Duration
	var bytes []int64
	r.Failed, r.Healthy = 0, 0
	for _, s := range r.Samples {
		if s.Error != "" {
			r.Failed++
			continue
		}
		if s.Healthy {
			r.Healthy++
		}
		downtimes, totals, bytes = append(downtimes, s.Downtime), append(totals, s.Total), append(bytes, s.Bytes)
		switchovers = append(switchovers, s.Switchover)
		if s.Own.Downtime > 0 {
			own = append(own, s.Own.Downtime)
		}
	}
	r.Switchover, r.Own = stats.Of(switchovers), stats.Of(own)
	r.Downtime, r.Total, r.Bytes = stats.Of(downtimes), stats.Of(totals), stats.Of(bytes)
}

// withVirsh sets lmctl against virsh.
func withVirsh(w Workload, ours, virsh Result) []Comparison {
	add := func(list []Comparison, how string, a, b stats.Summary[time.Duration]) []Comparison {
		return append(list, medians(w.Name+", "+how+": lmctl to virsh", a, b))
	}
	list := add(nil, "from outside", ours.Downtime, virsh.Downtime)
	list[0].Target = w.Target
	for _, by := range []string{ours.Contender, virsh.Contender} {
		if a, b := ours.after(by), virsh.after(by); a.N > 0 && b.N > 0 {
			list = add(list, "from outside, of guests that "+by+" had brought", a, b)
		}
	}
	list = add(list, "from outside, at the change of hosts", ours.Switchover, virsh.Switchover)
	return add(list, "by their own accounts", ours.Own, virsh.Own)
}

func medians(what string, a, b stats.Summary[time.Duration]) Comparison {
	return Comparison{What: what, A: a.Median, B: b.Median, Ratio: stats.Ratio(a.Median, b.Median)}
}

// after sums up the downtimes of guests that another contender had moved before.
func (r *Result) after(mover string) stats.Summary[time.Duration] {
	var downtimes []time.Duration
	for _, s := range r.Samples {
		if s.Error == "" && s.After == mover {
			downtimes = append(downtimes, s.Downtime)
		}
	}
	return stats.Of(downtimes)
}

// compare sets lmctl against the floor and against virsh, and guests that differ
// in nothing but their memory against each other.
func (r *Report) compare(workloads []Workload) {
	find := func(workload, contender string) (Result, bool) {
		for _, x := range r.Results {
			if x.Workload == workload && x.Contender == contender && x.Downtime.N > 0 {
				return x, true
			}
		}
		return Result{}, false
	}
	add := func(what string, a, b stats.Summary[time.Duration]) {
		r.Comparisons = append(r.Comparisons, medians(what, a, b))
	}
	r.Comparisons = []Comparison{}
	for _, w := range workloads {
		ours, ok := find(w.Name, "lmctl")
		if virsh, both := find(w.Name, "virsh"); ok && both {
			r.Comparisons = append(r.Comparisons, withVirsh(w, ours, virsh)...)
		}
		if floor, both := find(w.Name, "floor"); ok && both && w.Idle {
			add(w.Name+", stopped to running: lmctl to what QEMU itself needs", ours.Own, floor.Own)
			add(w.Name+", from outside: lmctl to what QEMU itself needs", ours.Downtime, floor.Downtime)
		}
	}
	members := families(workloads)
	for _, c := range Contenders(lab.Hypervisor(r.Hypervisor)) {
		for _, family := range slices.Sorted(maps.Keys(members)) {
			small, ok := find(members[family][0].Name, c.Name)
			large, both := find(members[family][1].Name, c.Name)
			if ok && both {
				add(fmt.Sprintf("%s, %s: %s to %s", family, c.Name,
					humanize.IBytes(uint64(large.Memory)), humanize.IBytes(uint64(small.Memory))), large.Downtime, small.Downtime)
			}
		}
	}
}

// families are the smallest and the largest workload of each family that has
// several.
func families(workloads []Workload) map[string][2]Workload {
	found := make(map[string][2]Workload)
	for _, w := range workloads {
		if w.Family == "" {
			continue
		}
		m, ok := found[w.Family]
		if !ok {
			m = [2]Workload{w, w}
		}
		if w.Memory < m[0].Memory {
			m[0] = w
		}
		if w.Memory > m[1].Memory {
			m[1] = w
		}
		found[w.Family] = m
	}
	for family, m := range found {
		if m[0].Memory == m[1].Memory {
			delete(found, family)
		}
	}
	return found
}

// line is a sample in a line of progress.
func (s Sample) line() string {
	if s.Error != "" {
		return "failed: " + s.Error
	}
	text := fmt.Sprintf("downtime %-8s total %-8s %s", ms(s.Downtime), brief(s.Total), humanize.IBytes(uint64(max(s.Bytes, 0))))
	if !s.Healthy {
		text += "  NOT HEALTHY: " + s.Problem
	}
	return text
}

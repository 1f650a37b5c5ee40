package bench

import (
	"bytes"
	"encoding/json"
	"strings"
	"testing"
	"time"

	"github.com/lmctl/lmctl/internal/lab"
)

func done(run int, downtime time.Duration) Sample {
	return Sample{Run: run, Downtime: downtime, Own: Own{Downtime: downtime / 2}, Total: 10 * downtime, Bytes: 1 << 20, Healthy: true}
}

// sampled is a report as Run makes it, of made-up samples.
func sampled() *Report {
	r := &Report{
		Version: "1.0", Took: 100 * time.Second, Link: "veth", Runs: 3, Hypervisor: "qemu",
		Machine: Machine{Kernel: "6.12", CPU: "A CPU", Cores: 2, MemoryBytes: 8 << 30, QEMU: "7.2.0"},
	}
	add := func(workload, contender string, memory int64, samples ...Sample) {
		x := Result{Workload: workload, WorkloadTitle: "a guest", Memory: memory, Accelerator: "tcg", Contender: contender, ContenderTitle: "who moves it", Samples: samples}
		x.sum()
		r.Results = append(r.Results, x)
	}
	const ms = time.Millisecond
	add("idle-256M", "lmctl", 256<<20, done(1, 12*ms), done(2, 10*ms), done(3, 14*ms))
	add("idle-256M", "floor", 256<<20, done(1, 8*ms), done(2, 8*ms), done(3, 9*ms))
	sick := done(2, 50*ms)
	sick.Healthy, sick.Problem = false, "page 7 is not as it was"
	add("idle-4G", "lmctl", 4<<30, done(1, 15*ms), sick, Sample{Run: 3, Error: "it did not converge"})
	add("idle-4G", "qemu", 4<<30, Sample{Run: 1, Error: "it did not converge"})
	var workloads []Workload
	for _, w := range Workloads(lab.QEMU) {
		if w.Name == "idle-256M" || w.Name == "idle-4G" {
			workloads = append(workloads, w)
		}
	}
	r.compare(workloads)
	return r
}

func TestSum(t *testing.T) {
	r := sampled()
	ours, broken, never := r.Results[0], r.Results[2], r.Results[3]
	if d := ours.Downtime; d.N != 3 || d.Min != 10*time.Millisecond || d.Median != 12*time.Millisecond || d.Max != 14*time.Millisecond {
		t.Errorf("downtime %+v", d)
	}
	if ours.Healthy != 3 || ours.Failed != 0 || ours.Bytes.Median != 1<<20 {
		t.Errorf("%+v", ours)
	}
	// A migration that failed has no downtime; that of a guest that is not
	// healthy counts, and is told.
	if broken.Downtime.N != 2 || broken.Healthy != 1 || broken.Failed != 1 {
		t.Errorf("%+v", broken)
	}
	if never.Downtime.N != 0 || never.Failed != 1 {
		t.Errorf("%+v", never)
	}
}

func TestCompare(t *testing.T) {
	got := sampled().Comparisons
	if len(got) != 3 {
		t.Fatalf("comparisons: %+v", got)
	}
	if c := got[0]; c.Ratio != 1.5 || c.A != 6*time.Millisecond || !strings.HasPrefix(c.What, "idle-256M, stopped to running") {
		t.Errorf("to the floor, by their own account: %+v", c)
	}
	if c := got[1]; c.Ratio != 1.5 || c.A != 12*time.Millisecond || !strings.HasPrefix(c.What, "idle-256M, from outside") {
		t.Errorf("to the floor, from outside: %+v", c)
	}
	// 32.5 ms is the median of the two that came to their end.
	if c := got[2]; c.A != 32500*time.Microsecond || c.B != 12*time.Millisecond || !strings.Contains(c.What, "4.0 GiB to 256 MiB") {
		t.Errorf("by memory: %+v", c)
	}
}

func TestTable(t *testing.T) {
	var b bytes.Buffer
	if err := sampled().WriteTable(&b); err != nil {
		t.Fatal(err)
	}
	text := b.String()
	for _, want := range []string{
		"lmctl 1.0, QEMU 7.2.0, Linux 6.12", "does not virtualize", "3 runs each",
		"idle-4G: a guest, 4.0 GiB, tcg", "1 of 2, 1 failed", "0 of 0, 1 failed", "12.0 ms : 8.0 ms = 1.50",
	} {
		if !strings.Contains(strings.Join(strings.Fields(text), " "), want) {
			t.Errorf("no %q in\n%s", want, text)
		}
	}
	for line := range strings.Lines(text) {
		if strings.HasPrefix(strings.TrimSpace(line), "floor  ") && strings.Contains(line, "8.0 ms") {
			if got := strings.Join(strings.Fields(line), " "); got != "floor 8.0 ms 8.0 ms 9.0 ms 4.0 ms 0.08 s 0.08 s 0.09 s 1.0 MiB 3 of 3" {
				t.Errorf("row %q", got)
			}
		}
	}
}

// The JSON is what others read: its keys stay.
func TestJSON(t *testing.T) {
	b, err := json.Marshal(sampled())
	if err != nil {
		t.Fatal(err)
	}
	var got struct {
		Machine map[string]any `json:"machine"`
		Results []struct {
			Workload string           `json:"workload"`
			Downtime map[string]int64 `json:"downtime_ns"`
			Total    map[string]int64 `json:"total_ns"`
			Bytes    map[string]int64 `json:"bytes"`
			Samples  []map[string]any `json:"samples"`
		} `json:"results"`
		Comparisons []map[string]any `json:"comparisons"`
	}
	if err := json.Unmarshal(b, &got); err != nil {
		t.Fatal(err)
	}
	if len(got.Results) != 4 || got.Results[0].Downtime["median"] != 12e6 || got.Results[0].Total["max"] != 140e6 || got.Results[0].Bytes["n"] != 3 {
		t.Errorf("results: %+v", got.Results)
	}
	for _, key := range []string{"kernel", "cpu", "cores", "memory_bytes", "qemu", "cpu_virtualizes"} {
		if _, ok := got.Machine[key]; !ok {
			t.Errorf("machine without %s: %v", key, got.Machine)
		}
	}
	for _, key := range []string{"run", "source", "destination", "downtime_ns", "since_ns", "quiet_ns", "late_ns", "total_ns", "bytes", "own", "healthy"} {
		if _, ok := got.Results[0].Samples[0][key]; !ok {
			t.Errorf("sample without %s: %v", key, got.Results[0].Samples[0])
		}
	}
	if len(got.Comparisons) != 3 || got.Comparisons[0]["ratio"] != 1.5 {
		t.Errorf("comparisons: %v", got.Comparisons)
	}
}

func TestNamed(t *testing.T) {
	name := func(c Contender) string { return c.Name }
	if got, unknown := Named(Contenders(lab.QEMU), name, []string{"floor", "lmctl"}); unknown != "" || len(got) != 2 || got[0].Name != "floor" {
		t.Errorf("%v, unknown %q", got, unknown)
	}
	if _, unknown := Named(Contenders(lab.QEMU), name, []string{"lmctl", "teleport"}); unknown != "teleport" {
		t.Errorf("unknown %q", unknown)
	}
}

// Every value is fit to be run: names are unique and name guests, and flat
// guests have images.
func TestValues(t *testing.T) {
	for _, h := range []lab.Hypervisor{lab.QEMU, lab.Libvirt} {
		seen := make(map[string]bool)
		for _, c := range Contenders(h) {
			if seen[c.Name] || c.Title == "" || c.keeper == nil || c.keeper.limit <= 0 ||
				(c.keeper == byBench) != (c.travel != nil) || (c.keeper == byLibvirt) != (c.order != nil) || (c.keeper == byLibvirt) != (h == lab.Libvirt) {
				t.Errorf("%s: contender %+v", h, c)
			}
			seen[c.Name] = true
		}
		for _, w := range Workloads(h) {
			if seen[w.Name] || w.Title == "" || w.Memory == 0 || w.program == nil {
				t.Errorf("%s: workload %+v", h, w)
			}
			seen[w.Name] = true
			if f, ok := w.program.(flatProgram); ok {
				if _, err := f.config.Image(); err != nil || f.config.Memory != w.Memory {
					t.Errorf("workload %s: memory %d, %v", w.Name, f.config.Memory, err)
				}
			}
			// libvirt shortens longer names.
			if name := w.Name + "-" + byLibvirt.name; h == lab.Libvirt && len(name) > 20 {
				t.Errorf("a domain called %s", name)
			}
		}
		if !seen[Smallest] {
			t.Errorf("%s: no workload %s", h, Smallest)
		}
	}
}

func TestFileOffset(t *testing.T) {
	for _, c := range []struct {
		memory int64
		gpa    uint64
		want   int64
	}{
		{256 << 20, 0x7e08, 0x7e08},
		{4 << 30, 0x7e08, 0x7e08},
		{4 << 30, 1 << 32, 3 << 30},
		{4 << 30, 1<<32 + 4096, 3<<30 + 4096},
	} {
		if got := fileOffset(c.memory, c.gpa); got != c.want {
			t.Errorf("%#x of %#x: %#x, want %#x", c.gpa, c.memory, got, c.want)
		}
	}
}

package bench

import (
	"bytes"
	"context"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/digitalocean/go-libvirt"

	"github.com/lmctl/lmctl/guest/flat"
	"github.com/lmctl/lmctl/internal/lab"
	"github.com/lmctl/lmctl/migrate"
)

// Contenders that share a guest go as often from the one host as from the other,
// however many they are.
func TestOrderIsFair(t *testing.T) {
	if got := [][]int{order(1, 3), order(2, 3), order(3, 3)}; !slices.Equal(got[0], []int{0, 1, 2}) ||
		!slices.Equal(got[1], []int{2, 1, 0}) || !slices.Equal(got[2], []int{0, 1, 2}) {
		t.Errorf("%v", got)
	}
	for n := 1; n <= 4; n++ {
		from := make([][2]int, n) // by contender: how many times from which host
		turns := 0
		for run := 1; run <= 10; run++ {
			for _, i := range order(run, n) {
				from[i][turns%2]++
				turns++
			}
		}
		for i, f := range from {
			if f != [2]int{5, 5} {
				t.Errorf("contender %d of %d: %v", i, n, f)
			}
		}
	}
}

// twoOfLibvirt is a report of two contenders that shared a guest.
func twoOfLibvirt() *Report {
	const ms = time.Millisecond
	start := time.Now()
	sample := func(run int, after time.Duration, from, to string, downtime time.Duration) Sample {
		s := done(run, downtime)
		s.Started, s.Source, s.Destination, s.Switchover = start.Add(after), from, to, downtime-ms
		return s
	}
	r := &Report{Version: "1.0", Link: "veth", Runs: 2, Hypervisor: string(lab.Libvirt), Machine: Machine{QEMU: "7.2.0", Libvirt: "9.0.0"}}
	ours := []Sample{sample(1, 0, "host1", "host2", 10*ms), sample(2, 3*time.Second, "host2", "host1", 12*ms)}
	ours[0].Own.Parts = []Part{{"stop", 2 * ms}, {"state load", 8 * ms}}
	ours[1].Own.Parts = []Part{{"stop", 4 * ms}, {"state load", 6 * ms}}
	ours[1].After = "virsh"
	theirs := []Sample{sample(1, time.Second, "host2", "host1", 44*ms), {
		Run: 2, Started: start.Add(2 * time.Second), Source: "host1", Destination: "host2", Error: "it did not converge",
	}}
	for name, samples := range map[string][]Sample{"lmctl": ours, "virsh": theirs} {
		x := Result{Workload: "writer", Contender: name, Samples: samples}
		x.sum()
		r.Results = append(r.Results, x)
	}
	slices.SortFunc(r.Results, func(a, b Result) int { return strings.Compare(a.Contender, b.Contender) })
	r.Results[1].Samples[0].After = "virsh"
	r.compare(Workloads(lab.Libvirt))
	return r
}

func TestCompareWithVirsh(t *testing.T) {
	const ms = time.Millisecond
	want := []Comparison{
		{"writer, from outside: lmctl to virsh", 11 * ms, 44 * ms, 0.25, 0.5},
		{"writer, from outside, of guests that virsh had brought: lmctl to virsh", 12 * ms, 44 * ms, 12. / 44, 0},
		{"writer, from outside, at the change of hosts: lmctl to virsh", 10 * ms, 43 * ms, 10. / 43, 0},
		{"writer, by their own accounts: lmctl to virsh", 5500 * time.Microsecond, 22 * ms, 0.25, 0},
	}
	if got := twoOfLibvirt().Comparisons; !slices.Equal(got, want) {
		t.Errorf("%+v", got)
	}
	var b bytes.Buffer
	if err := twoOfLibvirt().WriteTable(&b); err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{"libvirt 9.0.0, QEMU 7.2.0", "1 of 1, 1 failed", "11.0 ms : 44.0 ms = 0.25 (wanted: at most 0.5)"} {
		if !strings.Contains(strings.Join(strings.Fields(b.String()), " "), want) {
			t.Errorf("no %q in\n%s", want, b.String())
		}
	}
}

// Each run is printed, in the order in which they were.
func TestRuns(t *testing.T) {
	var b bytes.Buffer
	if err := twoOfLibvirt().WriteRuns(&b); err != nil {
		t.Fatal(err)
	}
	var rows []string
	for line := range strings.Lines(b.String()) {
		if f := strings.Fields(line); len(f) > 4 && (f[2] == "host1" || f[2] == "host2") {
			rows = append(rows, strings.Join(f, " "))
		}
	}
	want := []string{
		"1 lmctl host1 host2 10.0 ms 9.0 ms 5.0 ms - 0.10 s 0.0 ms 0.0 ms",
		"1 virsh host2 host1 44.0 ms 43.0 ms 22.0 ms - 0.44 s 0.0 ms 0.0 ms",
		"2 virsh host1 host2 failed: it did not converge",
		"2 lmctl host2 host1 12.0 ms 11.0 ms 6.0 ms - 0.12 s 0.0 ms 0.0 ms",
	}
	if !slices.Equal(rows, want) {
		t.Errorf("rows:\n%s", strings.Join(rows, "\n"))
	}
	if text := b.String(); !strings.Contains(text, "stop 3.0 ms, state load 7.0 ms") || strings.Contains(text, "virsh's own account") {
		t.Errorf("parts in\n%s", text)
	}
}

func TestOwnJob(t *testing.T) {
	said := []libvirt.TypedParam{
		{Field: "downtime", Value: *libvirt.NewTypedParamValueUllong(143)},
		{Field: "downtime_net", Value: *libvirt.NewTypedParamValueUllong(140)},
		{Field: "memory_iteration", Value: *libvirt.NewTypedParamValueUllong(4)},
		{Field: "memory_dirty_rate", Value: *libvirt.NewTypedParamValueString("much")},
	}
	if own := ownJob(said); own.Downtime != 143*time.Millisecond || own.Passes != 4 {
		t.Errorf("%+v", own)
	}
	if own := ownJob(nil); own.Downtime != 0 || own.Passes != 0 {
		t.Errorf("of nothing: %+v", own)
	}
}

func TestLmctlAccount(t *testing.T) {
	d := &domain{guest: lab.Guest{GuestSpec: lab.GuestSpec{Name: "web"}}}
	own, err := lmctlAccount(t.Context(), d, []byte(`{"mode": "direct", "downtime_ns": 5, "passes": [{}, {}], "switchover_reason": "converged"}`))
	if err != nil || own.Downtime != 5 || own.Passes != 2 || own.Reason != string(migrate.Converged) {
		t.Errorf("%+v, %v", own, err)
	}
	for name, out := range map[string]string{"not direct": `{"mode": "relay"}`, "no report": "moved"} {
		if _, err := lmctlAccount(t.Context(), d, []byte(out)); err == nil {
			t.Errorf("%s: no error", name)
		}
	}
}

// A memory file is found in a folder of its own that is not there before.
func TestArrivalInAFolder(t *testing.T) {
	folder := t.TempDir()
	path := filepath.Join(folder, "7-web", "pc.ram")
	probe := flat.NewProbe(flat.DefaultInterval)
	defer probe.Close()
	a, err := expect(coming{folder, func() (string, error) { return path, nil }})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	added := make(chan error, 1)
	go func() { added <- a.add(ctx, probe, flat.CounterAddr) }()
	if err := os.Mkdir(filepath.Dir(path), 0o700); err != nil {
		t.Fatal(err)
	}
	f, err := os.Create(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if err := f.Truncate(1 << 20); err != nil {
		t.Fatal(err)
	}
	if err := <-added; err != nil {
		t.Fatal(err)
	}
	if _, err := f.WriteAt([]byte{1}, flat.CounterAddr); err != nil {
		t.Fatal(err)
	}
	if err := awaitMoving(ctx, probe); err != nil {
		t.Error(err)
	}
}

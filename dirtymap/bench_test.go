//go:build amd64

package dirtymap

import (
	"fmt"
	"testing"
)

// BenchmarkPeek: what is not in use costs nothing.
func BenchmarkPeek(b *testing.B) {
	for _, c := range []struct{ size, used int }{{256, 100}, {4096, 100}, {4096, 4096}} {
		b.Run(fmt.Sprintf("%dMiB of %d", c.used, c.size), func(b *testing.B) {
			benchmark(b, c.size, c.used, func(tr *Tracker, tg *target, m []*Bitmap) error { return tr.Peek(m) })
		})
	}
}

// BenchmarkCollect: every second page was written, and every twelfth.
func BenchmarkCollect(b *testing.B) {
	for _, gap := range []int{2, 12} {
		b.Run(fmt.Sprintf("a page in %d", gap), func(b *testing.B) {
			benchmark(b, 256, 100, func(tr *Tracker, tg *target, m []*Bitmap) error {
				b.StopTimer()
				tg.do(b, "every%d 0 25600", gap)
				b.StartTimer()
				return tr.Collect(m)
			})
		})
	}
}

// benchmark tracks a process with size MiB of memory, of which used hold data.
func benchmark(b *testing.B, size, used int, f func(*Tracker, *target, []*Bitmap) error) {
	requireTracking(b)
	tg := startTarget(b, shmDir(b), size<<20/PageSize)
	tg.do(b, "write 0 %d", used<<20/PageSize)
	tr, err := Attach(tg.Process, []Region{tg.Region})
	if err != nil {
		b.Fatal(err)
	}
	defer tr.Close()
	m := []*Bitmap{New(size << 20 / PageSize)}
	for b.Loop() {
		if err := f(tr, tg, m); err != nil {
			b.Fatal(err)
		}
	}
	b.ReportMetric(float64(m[0].Count()), "pages")
}

package dirtymap

import (
	"math/rand/v2"
	"slices"
	"testing"
)

// model is a set of pages as anybody would write it.
type model []bool

func (m model) runs() (r [][2]int) {
	for i := 0; i < len(m); i++ {
		lo := i
		for i < len(m) && m[i] {
			i++
		}
		if i > lo {
			r = append(r, [2]int{lo, i - lo})
		}
	}
	return r
}

func (m model) count() (n int) {
	for _, on := range m {
		if on {
			n++
		}
	}
	return n
}

// agree compares everything that a bitmap tells with the model.
func agree(t *testing.T, b *Bitmap, m model) {
	t.Helper()
	if b.Len() != len(m) || b.Count() != m.count() || b.Empty() != (m.count() == 0) {
		t.Fatalf("length %d, count %d, empty %v; want %d, %d", b.Len(), b.Count(), b.Empty(), len(m), m.count())
	}
	var runs [][2]int
	for lo, n := range b.Runs() {
		runs = append(runs, [2]int{lo, n})
	}
	if !slices.Equal(runs, m.runs()) {
		t.Fatalf("runs %v, want %v", runs, m.runs())
	}
	for i, on := range m {
		if b.Test(i) != on {
			t.Fatalf("page %d: %v", i, b.Test(i))
		}
		lo, n, ok := b.NextRun(i)
		next := slices.Index(m[i:], true)
		if ok != (next >= 0) || ok && (lo != i+next || n < 1) {
			t.Fatalf("run after page %d: %d, %d, %v; want %d", i, lo, n, ok, next)
		}
	}
}

// apply does the operations that prog encodes to a bitmap and its model.
func apply(t *testing.T, n int, prog []byte) {
	a, b := New(n), New(n)
	ma, mb := make(model, n), make(model, n)
	at := func(x byte) int { return int(x) * (n + 1) / 256 }
	for len(prog) >= 3 {
		lo, hi := at(prog[1]), at(prog[2])
		if lo > hi {
			lo, hi = hi, lo
		}
		switch prog[0] % 10 {
		case 0, 1:
			a.SetRange(lo, hi)
			for i := lo; i < hi; i++ {
				ma[i] = true
			}
		case 2, 3:
			a.ClearRange(lo, hi)
			for i := lo; i < hi; i++ {
				ma[i] = false
			}
		case 4:
			if lo < n {
				a.Set(lo)
				ma[lo] = true
			}
		case 5:
			if lo < n {
				a.Clear(lo)
				ma[lo] = false
			}
		case 6:
			a.Swap(b)
			ma, mb = mb, ma
		case 7:
			a.Union(b)
			for i, on := range mb {
				ma[i] = ma[i] || on
			}
		case 8:
			a.Subtract(b)
			for i, on := range mb {
				ma[i] = ma[i] && !on
			}
		case 9:
			a.Intersect(b)
			for i, on := range mb {
				ma[i] = ma[i] && on
			}
		}
		agree(t, a, ma)
		agree(t, b, mb)
		if a.Equal(b) != slices.Equal(ma, mb) {
			t.Fatal("Equal is wrong")
		}
		prog = prog[3:]
	}
	c := a.Clone()
	a.Reset()
	agree(t, a, make(model, n))
	agree(t, c, ma)
	a.CopyFrom(c)
	agree(t, a, ma)
}

func TestBitmapAgainstModel(t *testing.T) {
	r := rand.New(rand.NewPCG(1, 2))
	for _, n := range []int{0, 1, 63, 64, 65, 127, 128, 129, 200, 513} {
		for range 20 {
			prog := make([]byte, 60)
			for i := range prog {
				prog[i] = byte(r.Uint32())
			}
			apply(t, n, prog)
		}
	}
}

func FuzzBitmap(f *testing.F) {
	f.Add(uint16(64), []byte{0, 0, 255, 6, 0, 0, 7, 0, 0})
	f.Add(uint16(65), []byte{0, 10, 200, 2, 50, 60, 6, 0, 0, 0, 1, 99, 8, 0, 0})
	f.Add(uint16(1), []byte{4, 0, 0, 9, 0, 0})
	f.Fuzz(func(t *testing.T, n uint16, prog []byte) {
		apply(t, int(n%700), prog[:min(len(prog), 90)])
	})
}

func TestBitmapRefusesWhatIsOutOfRange(t *testing.T) {
	for name, f := range map[string]func(b *Bitmap){
		"set":      func(b *Bitmap) { b.Set(100) },
		"negative": func(b *Bitmap) { b.Test(-1) },
		"range":    func(b *Bitmap) { b.SetRange(0, 101) },
		"reversed": func(b *Bitmap) { b.ClearRange(5, 4) },
		"lengths":  func(b *Bitmap) { b.Union(New(101)) },
	} {
		t.Run(name, func(t *testing.T) {
			defer func() {
				if recover() == nil {
					t.Error("no panic")
				}
			}()
			f(New(100))
		})
	}
}

// pass is what a pass of a migration does to bitmaps.
func pass(dirty, next *Bitmap) (pages int) {
	dirty.Swap(next)
	next.Reset()
	next.SetRange(10, 5000)
	for lo, n := range dirty.Runs() {
		dirty.ClearRange(lo, lo+n)
		pages += n
	}
	dirty.Union(next)
	dirty.Subtract(next)
	return pages + dirty.Count()
}

func TestPassDoesNotAllocate(t *testing.T) {
	a, b := New(1<<16), New(1<<16)
	if n := testing.AllocsPerRun(100, func() { pass(a, b) }); n != 0 {
		t.Errorf("%v allocations a pass", n)
	}
}

func BenchmarkRuns(b *testing.B) {
	m := New(1 << 20) // 4 GiB
	for i := 0; i < m.Len(); i += 7 {
		m.SetRange(i, min(i+3, m.Len()))
	}
	b.ReportAllocs()
	for b.Loop() {
		pages := 0
		for _, n := range m.Runs() {
			pages += n
		}
		if pages != m.Count() {
			b.Fatal(pages)
		}
	}
}

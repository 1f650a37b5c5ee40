package dirtymap

import (
	"fmt"
	"iter"
	"math/bits"
)

const wordBits = 64

// Bitmap is a set of pages numbered from 0 to Len-1. No method but New
// and Clone allocates. It is not safe for concurrent use.
//
// Methods that take another bitmap panic when its length differs, and those
// that take a page number when it is out of range: like an index, that is an
// error of the program.
type Bitmap struct {
	words []uint64 // bits past n are zero
	n     int
}

// New returns an empty set over n pages.
func New(n int) *Bitmap {
	return &Bitmap{words: make([]uint64, (n+wordBits-1)/wordBits), n: n}
}

// Clone returns a copy.
func (b *Bitmap) Clone() *Bitmap {
	return &Bitmap{words: append([]uint64(nil), b.words...), n: b.n}
}

// Len returns the number of pages that the set ranges over.
func (b *Bitmap) Len() int { return b.n }

func (b *Bitmap) check(lo, hi int) {
	if lo < 0 || hi < lo || hi > b.n {
		panic(fmt.Sprintf("dirtymap: pages %d to %d of a bitmap of %d", lo, hi, b.n))
	}
}

func (b *Bitmap) same(o *Bitmap) {
	if b.n != o.n {
		panic(fmt.Sprintf("dirtymap: bitmaps of %d and %d pages", b.n, o.n))
	}
}

// Set adds page i.
func (b *Bitmap) Set(i int) {
	b.check(i, i+1)
	b.words[i/wordBits] |= 1 << (i % wordBits)
}

// Clear removes page i.
func (b *Bitmap) Clear(i int) {
	b.check(i, i+1)
	b.words[i/wordBits] &^= 1 << (i % wordBits)
}

// Test says whether page i is in the set.
func (b *Bitmap) Test(i int) bool {
	b.check(i, i+1)
	return b.words[i/wordBits]>>(i%wordBits)&1 != 0
}

// edges returns the words that hold pages lo and hi-1, and the bits of the
// range in each of them. The range must not be empty.
func edges(lo, hi int) (first, last int, firstMask, lastMask uint64) {
	return lo / wordBits, (hi - 1) / wordBits,
		^uint64(0) << (lo % wordBits), ^uint64(0) >> (wordBits - 1 - (hi-1)%wordBits)
}

// SetRange adds the pages lo to hi-1.
func (b *Bitmap) SetRange(lo, hi int) {
	b.check(lo, hi)
	if lo == hi {
		return
	}
	first, last, fm, lm := edges(lo, hi)
	if first == last {
		b.words[first] |= fm & lm
		return
	}
	b.words[first] |= fm
	for i := first + 1; i < last; i++ {
		b.words[i] = ^uint64(0)
	}
	b.words[last] |= lm
}

// ClearRange removes the pages lo to hi-1.
func (b *Bitmap) ClearRange(lo, hi int) {
	b.check(lo, hi)
	if lo == hi {
		return
	}
	first, last, fm, lm := edges(lo, hi)
	if first == last {
		b.words[first] &^= fm & lm
		return
	}
	b.words[first] &^= fm
	clear(b.words[first+1 : last])
	b.words[last] &^= lm
}

// Reset empties the set.
func (b *Bitmap) Reset() { clear(b.words) }

// Count returns the number of pages in the set.
func (b *Bitmap) Count() int {
	c := 0
	for _, w := range b.words {
		c += bits.OnesCount64(w)
	}
	return c
}

// Empty says whether no page is in the set.
func (b *Bitmap) Empty() bool {
	for _, w := range b.words {
		if w != 0 {
			return false
		}
	}
	return true
}

// Equal says whether both hold the same pages of the same range.
func (b *Bitmap) Equal(o *Bitmap) bool {
	if b.n != o.n {
		return false
	}
	for i, w := range b.words {
		if w != o.words[i] {
			return false
		}
	}
	return true
}

// CopyFrom makes the set equal to o.
func (b *Bitmap) CopyFrom(o *Bitmap) {
	b.same(o)
	copy(b.words, o.words)
}

// Union adds the pages of o.
func (b *Bitmap) Union(o *Bitmap) {
	b.same(o)
	for i, w := range o.words {
		b.words[i] |= w
	}
}

// Subtract removes the pages of o.
func (b *Bitmap) Subtract(o *Bitmap) {
	b.same(o)
	for i, w := range o.words {
		b.words[i] &^= w
	}
}

// Intersect keeps only the pages that o has too.
func (b *Bitmap) Intersect(o *Bitmap) {
	b.same(o)
	for i, w := range o.words {
		b.words[i] &= w
	}
}

// Swap exchanges the contents of two sets of the same length in constant time.
func (b *Bitmap) Swap(o *Bitmap) {
	b.same(o)
	b.words, o.words = o.words, b.words
}

// NextRun returns the first run of pages in the set at or after page from: its
// first page and its length. ok is false when there is none.
func (b *Bitmap) NextRun(from int) (lo, n int, ok bool) {
	lo = b.next(from, 0)
	if lo >= b.n {
		return 0, 0, false
	}
	return lo, b.next(lo, ^uint64(0)) - lo, true
}

// next returns the first page at or after from whose bit, flipped by invert,
// is set, or n.
func (b *Bitmap) next(from int, invert uint64) int {
	from = max(from, 0)
	if from >= b.n {
		return b.n
	}
	i := from / wordBits
	w := (b.words[i] ^ invert) & (^uint64(0) << (from % wordBits))
	for w == 0 {
		if i++; i == len(b.words) {
			return b.n
		}
		w = b.words[i] ^ invert
	}
	return min(i*wordBits+bits.TrailingZeros64(w), b.n)
}

// Runs yields the runs of pages in the set in ascending order: first page and
// length. The set may lose pages, but not gain any, while it is iterated over.
func (b *Bitmap) Runs() iter.Seq2[int, int] {
	return func(yield func(lo, n int) bool) {
		for at := 0; ; {
			lo, n, ok := b.NextRun(at)
			if !ok || !yield(lo, n) {
				return
			}
			at = lo + n
		}
	}
}

// Package workload is what runs in a lab's Linux guest: a writer and checker of
// memory, a writer and checker of disk records, a meter of the clock, and the
// network services. It proves from inside that a guest is whole; nothing in it
// knows of migrations.
package workload

import (
	"encoding/binary"
	"fmt"
)

// PageSize is the unit of writing and checking memory, in bytes.
const PageSize = 4096

// A page of the working set says which page it is and how many times it was
// written; all words after these two follow from them and the seed. A page that
// is lost, stale, torn or in the wrong place shows.

// fillPage writes generation gen of page n.
func fillPage(p []byte, seed, n, gen uint64) {
	le := binary.LittleEndian
	p = p[:PageSize]
	le.PutUint64(p, n)
	le.PutUint64(p[8:], gen)
	step := mix(seed ^ mix(n^mix(gen)))
	x := step
	for i := 16; i < PageSize; i += 8 {
		le.PutUint64(p[i:], x)
		x += step
	}
}

// checkPage says what is wrong with page n, which was last written as
// generation gen, or nil. A page never written (generation 0) is all zeros.
func checkPage(p []byte, seed, n, gen uint64) error {
	le := binary.LittleEndian
	p = p[:PageSize]
	if gen == 0 {
		for i := 0; i < PageSize; i += 8 {
			if le.Uint64(p[i:]) != 0 {
				return fmt.Errorf("page %d was never written, but holds %#x at %d", n, le.Uint64(p[i:]), i)
			}
		}
		return nil
	}
	if have := le.Uint64(p); have != n {
		return fmt.Errorf("page %d, written %d times, holds %#x for its number", n, gen, have)
	}
	if have := le.Uint64(p[8:]); have != gen {
		return fmt.Errorf("page %d, written %d times, is as it was at time %d", n, gen, have)
	}
	step := mix(seed ^ mix(n^mix(gen)))
	x := step
	for i := 16; i < PageSize; i += 8 {
		if have := le.Uint64(p[i:]); have != x {
			return fmt.Errorf("page %d, written %d times, holds %#x at %d instead of %#x", n, gen, have, i, x)
		}
		x += step
	}
	return nil
}

// fillStatic writes the random content of page n of the static set, which does
// not compress.
func fillStatic(p []byte, seed, n uint64) {
	p = p[:PageSize]
	x := mix(seed^mix(n)) | 1
	for i := 0; i < PageSize; i += 8 {
		x = xorshift(x)
		binary.LittleEndian.PutUint64(p[i:], x)
	}
}

// StaticPage returns what page n of the static set of a guest with that seed
// holds, by which the page can be found in the guest's memory from outside.
func StaticPage(seed, n uint64) []byte {
	p := make([]byte, PageSize)
	fillStatic(p, seed, n)
	return p
}

func checkStatic(p []byte, seed, n uint64) error {
	p = p[:PageSize]
	x := mix(seed^mix(n)) | 1
	for i := 0; i < PageSize; i += 8 {
		x = xorshift(x)
		if have := binary.LittleEndian.Uint64(p[i:]); have != x {
			return fmt.Errorf("static page %d holds %#x at %d instead of %#x", n, have, i, x)
		}
	}
	return nil
}

// mix spreads the bits of x: the finalizer of splitmix64 (Steele, Lea and
// Flood, OOPSLA 2014).
func mix(x uint64) uint64 {
	x += 0x9e3779b97f4a7c15
	x = (x ^ x>>30) * 0xbf58476d1ce4e5b9
	x = (x ^ x>>27) * 0x94d049bb133111eb
	return x ^ x>>31
}

// xorshift is Marsaglia's generator of 64 bits; x must not be 0.
func xorshift(x uint64) uint64 {
	x ^= x << 13
	x ^= x >> 7
	return x ^ x<<17
}

// Package flat is a guest of one boot sector, for hosts whose /dev/kvm runs no
// whole operating system. It dirties a set number of pages at a set rate and
// keeps a counter and an error mark at a fixed place in its memory.
//
// Config.Image makes its disk. ReadState and Check judge a guest from its
// memory file. Probe watches the counters of all copies of a guest at once and
// tells the longest time in which none went on: the downtime as the guest saw
// it, measured from outside.
package flat

import (
	_ "embed"
	"encoding/binary"
	"errors"
	"fmt"
)

// sector is flat.S, assembled.
//
//go:embed flat.bin
var sector []byte

// Sizes and places, in bytes of guest physical memory where not said otherwise.
const (
	PageSize = 4096
	// DiskSize is the length of an image. SeaBIOS boots nothing much smaller
	// than this from an IDE disk.
	DiskSize = 1 << 20
	// FirstPage is the lowest address that the guest may be told to dirty.
	FirstPage = 1 << 20
	// TopReserve is what firmware may use at the top of memory.
	TopReserve = 2 << 20
)

// Pattern is the order in which pages are written, and what is written.
type Pattern string

// The patterns. Whatever the pattern, a pass visits each page once.
const (
	Sequential Pattern = "sequential" // in the order of addresses
	Random     Pattern = "random"     // scattered: each page is far from the one before
	Rewrite    Pattern = "rewrite"    // in order, but each page gets the value that it holds
)

// Config says what a flat guest does. Its zero value is an idle guest.
type Config struct {
	Memory  int64   // size of guest RAM in bytes
	Pages   int     // how many pages are dirtied, from FirstPage up
	Rate    int64   // pages a second; 0 for none, Unbounded for as many as it can
	Pattern Pattern // Sequential by default
}

// Unbounded is the Rate of a guest that never pauses.
const Unbounded = -1

const (
	// timerHz is what the interval timer counts, in ticks a second.
	timerHz = 1193182
	// tickHz is how often the guest wakes when nothing else asks for more.
	tickHz = 1000
	// chunkPages is how many pages an unbounded guest writes between two steps
	// of its counter: small enough that the counter moves every 0.1 ms.
	chunkPages = 16
	// maxDivisor is the timer's longest interval.
	maxDivisor = 0xffff
)

// Places of the parameters in the sector; see flat.S.
const (
	offFirst   = 0x1d8
	offEnd     = 0x1dc
	offPages   = 0x1e0
	offSpan    = 0x1e4
	offStep    = 0x1e8
	offChunk   = 0x1ec
	offDelta   = 0x1f0
	offReport  = 0x1f4
	offDivisor = 0x1f8
	offPaced   = 0x1fa
)

// Image returns the guest's disk, DiskSize bytes that boot to what c says.
func (c Config) Image() ([]byte, error) {
	if err := c.validate(); err != nil {
		return nil, fmt.Errorf("flat guest: %w", err)
	}
	if len(sector) != 512 || sector[510] != 0x55 || sector[511] != 0xaa {
		return nil, errors.New("flat guest: the built-in boot sector is damaged")
	}
	img := make([]byte, DiskSize)
	copy(img, sector)
	le := binary.LittleEndian
	put := func(off int, v uint32) { le.PutUint32(img[off:], v) }

	span := uint32(c.Pages * PageSize)
	put(offFirst, FirstPage)
	put(offEnd, FirstPage+span)
	put(offPages, uint32(c.Pages))
	put(offSpan, span)
	put(offStep, uint32(c.stride()*PageSize))
	if c.Pattern != Rewrite {
		put(offDelta, 1)
	}
	chunk, hz := c.pace()
	put(offChunk, uint32(chunk))
	put(offReport, c.reportMask(hz))
	le.PutUint16(img[offDivisor:], uint16(min(timerHz/hz, maxDivisor)))
	if c.Rate != Unbounded {
		img[offPaced] = 1
	}
	return img, nil
}

func (c Config) validate() error {
	top := c.Memory - TopReserve
	// Memory above 3 GiB may lie beyond the reach of 32 bits.
	top = min(top, 3<<30)
	switch {
	case c.Memory < 16<<20:
		return fmt.Errorf("memory of %d bytes: 16 MiB is the least", c.Memory)
	case c.Pages < 0 || int64(c.Pages)*PageSize > top-FirstPage:
		return fmt.Errorf("%d pages do not fit: a guest of %d bytes can dirty %d", c.Pages, c.Memory, (top-FirstPage)/PageSize)
	case c.Rate < Unbounded:
		return fmt.Errorf("rate of %d pages a second", c.Rate)
	case c.Rate != 0 && c.Pages == 0:
		return errors.New("a rate, but no pages to dirty")
	}
	switch c.Pattern {
	case "", Sequential, Random, Rewrite:
		return nil
	}
	return fmt.Errorf("no such pattern: %q", c.Pattern)
}

// pace returns how many pages are written at a time, and how many times a
// second at most.
func (c Config) pace() (chunk, hz int64) {
	switch {
	case c.Rate == Unbounded:
		return chunkPages, tickHz
	case c.Rate == 0:
		return 0, tickHz
	}
	chunk = (c.Rate + tickHz - 1) / tickHz
	return chunk, max(c.Rate/chunk, timerHz/maxDivisor+1)
}

// reportMask makes the guest print its counter every second or two.
func (c Config) reportMask(hz int64) uint32 {
	if c.Rate == Unbounded {
		return 1<<14 - 1
	}
	mask := uint32(1)
	for int64(mask) < hz {
		mask <<= 1
	}
	return mask - 1
}

// stride is the distance, in pages, between a page and the next one written.
// It has no common factor with the number of pages, so that a pass visits each
// of them once.
func (c Config) stride() int {
	if c.Pattern != Random || c.Pages < 3 {
		return 1
	}
	// The golden section scatters best.
	s := int(float64(c.Pages) * 0.6180339887)
	for gcd(s, c.Pages) != 1 {
		s++
	}
	return s
}

func gcd(a, b int) int {
	for b != 0 {
		a, b = b, a%b
	}
	return a
}

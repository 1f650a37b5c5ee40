package sys

import (
	"errors"
	"fmt"
	"iter"
	"os"

	"golang.org/x/sys/unix"
)

// Extent is a part of a file, in bytes.
type Extent struct {
	Off, Len int64
}

// DataRuns yields the parts of f between off and end that are not holes, in
// order, as SEEK_DATA and SEEK_HOLE tell. They are the file system's, not
// rounded. After an error it yields no more. It moves the file's offset, so
// that f is to be read by offset only.
func DataRuns(f *os.File, off, end int64) iter.Seq2[Extent, error] {
	return func(yield func(Extent, error) bool) {
		for off < end {
			data, err := f.Seek(off, unix.SEEK_DATA)
			if errors.Is(err, unix.ENXIO) { // nothing but a hole, or past the end
				return
			}
			if err != nil {
				yield(Extent{}, fmt.Errorf("SEEK_DATA %#x: %w", off, err))
				return
			}
			if data >= end {
				return
			}
			hole, err := f.Seek(data, unix.SEEK_HOLE)
			if err != nil {
				yield(Extent{}, fmt.Errorf("SEEK_HOLE %#x: %w", data, err))
				return
			}
			hole = min(hole, end)
			// They are equal when the data was punched out between the calls.
			if hole > data && !yield(Extent{Off: data, Len: hole - data}, nil) {
				return
			}
			off = hole
		}
	}
}

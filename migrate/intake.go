package migrate

import (
	"bufio"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"sync"

	"github.com/cespare/xxhash/v2"
	"golang.org/x/sys/unix"

	"github.com/lmctl/lmctl/dirtymap"
	"github.com/lmctl/lmctl/internal/sys"
)

// intake puts what arrives on the data connections into the shell's memory.
type intake struct {
	mem     blocks
	infos   []BlockInfo
	streams int
	// passDone is called once for each pass, when every stream has ended it.
	passDone func(pass uint32, c checked) error

	mu    sync.Mutex
	pass  uint32 // the newest pass that every stream has ended
	ended int    // streams that have ended pass+1
	sum   checked
	seen  []*dirtymap.Bitmap // pages whose hash has been compared
}

// checked is what comparing hashes has found so far.
type checked struct {
	pages, mismatches int64
	first             string
}

func newIntake(mem blocks, streams int, passDone func(uint32, checked) error) *intake {
	return &intake{mem: mem, infos: mem.infos(), streams: streams, passDone: passDone, seen: mem.bitmaps()}
}

// readBuffer holds headers and scattered pages; longer runs go around it,
// straight into guest memory.
const readBuffer = 64 << 10

// serve handles one data connection until it ends or breaks the protocol.
func (in *intake) serve(conn io.Reader) error {
	r := bufio.NewReaderSize(conn, readBuffer)
	hashes := make([]byte, maxHashes*8)
	return guarded("write guest memory", func() error {
		for pass := uint32(1); ; {
			var hdr [dataHdrSize]byte
			if _, err := io.ReadFull(r, hdr[:]); err != nil {
				return err
			}
			h, err := parseDataHeader(hdr[:])
			if err != nil {
				return err
			}
			if h.pass != pass {
				return violation("pass %d while pass %d is under way", h.pass, pass)
			}
			if h.typ == dataEnd {
				if err := in.end(pass); err != nil {
					return err
				}
				pass++
				continue
			}
			if err := in.current(pass); err != nil {
				return err
			}
			if err := in.frame(r, h, hashes); err != nil {
				return err
			}
		}
	})
}

func (in *intake) frame(r io.Reader, h dataHeader, hashes []byte) error {
	if err := h.within(in.infos); err != nil {
		return err
	}
	b := in.mem[h.block]
	first, n := int(h.first), int(h.pages)
	switch h.typ {
	case dataPages:
		_, err := io.ReadFull(r, b.run(first, n))
		return err
	case dataZero:
		return b.clear(first, n)
	case dataHashes:
		if _, err := io.ReadFull(r, hashes[:h.length]); err != nil {
			return err
		}
		return in.compare(h, hashes[:h.length])
	default: // zero-hashes: parseDataHeader lets nothing else through
		return in.compareZero(h)
	}
}

// current refuses pages of a pass that has to wait for another stream's older
// copies of the same pages.
func (in *intake) current(pass uint32) error {
	in.mu.Lock()
	defer in.mu.Unlock()
	if pass != in.pass+1 {
		return violation("pages of pass %d before pass %d has ended on every stream", pass, in.pass+1)
	}
	return nil
}

// end notes that a stream has ended a pass.
func (in *intake) end(pass uint32) error {
	in.mu.Lock()
	defer in.mu.Unlock()
	if pass != in.pass+1 {
		return violation("end of pass %d, pass %d is under way", pass, in.pass+1)
	}
	if in.ended++; in.ended < in.streams {
		return nil
	}
	in.pass, in.ended = pass, 0
	return in.passDone(pass, in.sum)
}

// clear makes pages zero. A hole is zero and costs no memory; not every memory
// file system can punch one.
func (b block) clear(first, n int) error {
	err := unix.Fallocate(int(b.File.Fd()), unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, int64(first)*PageSize, int64(n)*PageSize)
	if errors.Is(err, unix.EOPNOTSUPP) {
		clear(b.run(first, n))
		return nil
	}
	if err != nil {
		return fmt.Errorf("clear pages %d+%d of memory block %q: %w", first, n, b.Name, err)
	}
	return nil
}

func (in *intake) compare(h dataHeader, hashes []byte) error {
	b := in.mem[h.block]
	var differ []int
	for i := range int(h.pages) {
		p := int(h.first) + i
		if xxhash.Sum64(b.run(p, 1)) != binary.BigEndian.Uint64(hashes[i*8:]) {
			differ = append(differ, p)
		}
	}
	return in.note(h, differ)
}

// compareZero looks only at pages that are there: reading a hole would fill it.
func (in *intake) compareZero(h dataHeader) error {
	b := in.mem[h.block]
	var differ []int
	lo, hi := int64(h.first)*PageSize, int64(h.first+uint64(h.pages))*PageSize
	for run, err := range sys.DataRuns(b.File, lo, hi) {
		if err != nil {
			return fmt.Errorf("find the holes of memory block %q: %w", b.Name, err)
		}
		first, end := pageRange(run)
		for p := first; p < end; p++ {
			if !isZero(b.run(p, 1)) {
				differ = append(differ, p)
			}
		}
	}
	return in.note(h, differ)
}

// note counts compared pages, each once.
func (in *intake) note(h dataHeader, differ []int) error {
	in.mu.Lock()
	defer in.mu.Unlock()
	seen := in.seen[h.block]
	before := seen.Count()
	seen.SetRange(int(h.first), int(h.first)+int(h.pages))
	if seen.Count()-before != int(h.pages) {
		return violation("hashes of pages %d+%d of block %q come twice", h.first, h.pages, in.infos[h.block].Name)
	}
	in.sum.pages += int64(h.pages)
	in.sum.mismatches += int64(len(differ))
	if in.sum.first == "" && len(differ) > 0 {
		in.sum.first = fmt.Sprintf("block %q page %#x", in.infos[h.block].Name, differ[0]*PageSize)
	}
	return nil
}

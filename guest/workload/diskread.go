package workload

import (
	"context"
	"fmt"
	"sync"

	"golang.org/x/sys/unix"
)

// landing is how many records each reader keeps in memory before it reads over
// them, having checked that they are still what was read.
const landing = 64

// Read keeps as many direct reads in flight as the setting says, and proves of
// each that it brought a whole record and that the record is still in memory
// later. It returns when ctx ends.
func (d *Disk) Read(ctx context.Context) {
	for ctx.Err() == nil {
		s, changed := d.current()
		if s.Readers == 0 {
			select {
			case <-ctx.Done():
			case <-changed:
			}
			continue
		}
		round, cancel := context.WithCancel(ctx)
		var wg sync.WaitGroup
		for i := range s.Readers {
			wg.Go(func() { d.reader(round, uint64(i+1)) })
		}
		select {
		case <-ctx.Done():
		case <-changed:
		}
		cancel()
		wg.Wait()
	}
}

func (d *Disk) reader(ctx context.Context, id uint64) {
	buf, err := anonymous(landing * RecordSize)
	if err != nil {
		d.fail(fmt.Errorf("memory to read into: %w", err))
		return
	}
	defer func() { _ = unix.Munmap(buf) }() // of a mapping that is ours: cannot fail
	held := [landing]uint64{}               // number of the record in each place
	random := mix(d.seed ^ mix(id))
	for i := 0; ctx.Err() == nil; i = (i + 1) % landing {
		place := buf[i*RecordSize:][:RecordSize]
		if held[i] != 0 {
			if err := checkPage(place, d.seed, held[i], recordMark); err != nil {
				d.mismatches.Add(1)
				d.problems.Add(fmt.Errorf("disk: in memory since it was read: %w", err))
			}
		}
		random = xorshift(random | 1)
		if held[i], err = d.readOne(place, random%d.slots); err != nil {
			d.fail(err)
			return
		}
	}
}

// readOne reads a slot, while others may write it, and returns the number of
// the record that came, or 0 for a slot that is still unused.
func (d *Disk) readOne(place []byte, slot uint64) (uint64, error) {
	d.mu.Lock()
	least := d.newest(slot)
	d.mu.Unlock()
	if _, err := d.file.ReadAt(place, int64(slot*RecordSize)); err != nil {
		return 0, err
	}
	d.checked.Add(1)
	n, ok := parseRecord(place, d.seed)
	switch {
	case ok && n >= least && n%d.slots == slot:
		return n, nil
	case least == 0:
		return 0, nil
	}
	// A read beside the write of the same sectors may come out torn: look again
	// with the writer kept away.
	d.mu.Lock()
	defer d.mu.Unlock()
	least = d.newest(slot)
	if _, err := d.file.ReadAt(place, int64(slot*RecordSize)); err != nil {
		return 0, err
	}
	if n, ok = parseRecord(place, d.seed); ok && n == least {
		return n, nil
	}
	d.mismatch(least, slot, n)
	return 0, nil
}

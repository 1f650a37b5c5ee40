package workload

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"os"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"github.com/lmctl/lmctl/guest/control"
)

// RecordSize is the length of a disk record in bytes.
const RecordSize = PageSize

// recordMark stands where a page of memory has its generation.
const recordMark = 0x4c4d52454344 // "LMRECD"

// maxSlots bounds how much of a disk is used: 16 MiB.
const maxSlots = 4096

// Disk writes numbered records to a block device, each synced before the next,
// and checks that every one that it was told to be on stable storage is there.
// Record n, from 1, lies in slot n modulo the number of slots.
type Disk struct {
	file     *os.File
	seed     uint64
	slots    uint64
	problems *Problems

	mu   sync.Mutex // guards the device and what follows
	buf  []byte
	last uint64

	settingMu sync.Mutex
	setting   control.DiskSetting
	changed   chan struct{}

	checked, mismatches, failed atomic.Uint64
}

// OpenDisk opens a device (or a file, for tests) and finds the last record that
// is on it, to go on from there.
func OpenDisk(path string, setting control.DiskSetting, seed uint64, problems *Problems) (*Disk, error) {
	if err := setting.Validate(); err != nil {
		return nil, err
	}
	f, err := os.OpenFile(path, os.O_RDWR|unix.O_DIRECT, 0)
	if err != nil {
		return nil, fmt.Errorf("disk: %w", err)
	}
	d := &Disk{file: f, seed: seed, problems: problems, setting: setting, changed: make(chan struct{})}
	if err := d.prepare(); err != nil {
		return nil, errors.Join(fmt.Errorf("disk %s: %w", path, err), d.Close())
	}
	return d, nil
}

func (d *Disk) prepare() error {
	size, err := d.file.Seek(0, io.SeekEnd)
	if err != nil {
		return err
	}
	if d.slots = min(uint64(size)/RecordSize, maxSlots); d.slots < 2 {
		return fmt.Errorf("%d bytes: too small for two records", size)
	}
	// O_DIRECT wants its memory aligned.
	if d.buf, err = anonymous(RecordSize); err != nil {
		return err
	}
	d.last, err = LastRecord(d.file, d.buf, d.slots, d.seed)
	return err
}

// LastRecord finds the number of the last record on a disk of a guest with that
// seed, or 0. buf is a RecordSize of scratch memory, fit for reading from r.
func LastRecord(r io.ReaderAt, buf []byte, slots, seed uint64) (uint64, error) {
	last := uint64(0)
	for slot := range slots {
		if _, err := r.ReadAt(buf, int64(slot*RecordSize)); err != nil {
			return 0, err
		}
		if n, ok := parseRecord(buf, seed); ok && n%slots == slot {
			last = max(last, n)
		}
	}
	return last, nil
}

// parseRecord returns the number of the record in buf, if there is a whole one.
func parseRecord(buf []byte, seed uint64) (uint64, bool) {
	n := binary.LittleEndian.Uint64(buf)
	return n, n != 0 && checkPage(buf, seed, n, recordMark) == nil
}

// Close closes the device.
func (d *Disk) Close() error {
	if d.buf != nil {
		_ = unix.Munmap(d.buf) // of a mapping that is ours: cannot fail
		d.buf = nil
	}
	return d.file.Close()
}

// Set changes what the writer and the readers do.
func (d *Disk) Set(s control.DiskSetting) error {
	if err := s.Validate(); err != nil {
		return err
	}
	d.settingMu.Lock()
	defer d.settingMu.Unlock()
	d.setting = s
	close(d.changed)
	d.changed = make(chan struct{})
	return nil
}

func (d *Disk) current() (control.DiskSetting, <-chan struct{}) {
	d.settingMu.Lock()
	defer d.settingMu.Unlock()
	return d.setting, d.changed
}

// Status is the account so far.
func (d *Disk) Status() *control.DiskStatus {
	s, _ := d.current()
	d.mu.Lock()
	defer d.mu.Unlock()
	return &control.DiskStatus{
		Setting: s, Device: d.file.Name(), Last: d.last, Checked: d.checked.Load(),
		Mismatches: d.mismatches.Load(), Errors: d.failed.Load(),
	}
}

// Write is the writer. It returns when ctx ends.
func (d *Disk) Write(ctx context.Context) {
	pace(ctx, paceTick, 1, func() (int64, <-chan struct{}) {
		s, changed := d.current()
		return int64(s.Rate), changed
	}, func() {
		if err := d.append(); err != nil {
			d.fail(err)
			// A device that fails at once would keep the writer spinning.
			select {
			case <-ctx.Done():
			case <-time.After(time.Second):
			}
		}
	})
}

func (d *Disk) fail(err error) {
	d.failed.Add(1)
	d.problems.Add(fmt.Errorf("disk: %w", err))
}

// append writes one record. It counts once it has been synced.
func (d *Disk) append() error {
	d.mu.Lock()
	defer d.mu.Unlock()
	n := d.last + 1
	fillPage(d.buf, d.seed, n, recordMark)
	if _, err := d.file.WriteAt(d.buf, int64(n%d.slots*RecordSize)); err != nil {
		return err
	}
	if err := d.file.Sync(); err != nil {
		return err
	}
	d.last = n
	return nil
}

// CheckAll reads all records that are to be there and returns how many are not.
func (d *Disk) CheckAll(ctx context.Context) (wrong int, err error) {
	for slot := range d.slots {
		if err := ctx.Err(); err != nil {
			return wrong, fmt.Errorf("disk: check: %w", err)
		}
		ok, err := d.checkSlot(slot)
		if err != nil {
			d.fail(err)
			return wrong, fmt.Errorf("disk: check: %w", err)
		}
		if !ok {
			wrong++
		}
	}
	return wrong, nil
}

func (d *Disk) checkSlot(slot uint64) (bool, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	want := d.newest(slot)
	if want == 0 {
		return true, nil
	}
	if _, err := d.file.ReadAt(d.buf, int64(slot*RecordSize)); err != nil {
		return false, err
	}
	d.checked.Add(1)
	n, ok := parseRecord(d.buf, d.seed)
	if ok && n == want {
		return true, nil
	}
	d.mismatch(want, slot, n)
	return false, nil
}

// newest is the number of the last record in a slot, or 0 if none was written
// there.
func (d *Disk) newest(slot uint64) uint64 {
	back := (d.last%d.slots + d.slots - slot) % d.slots
	if back >= d.last {
		return 0
	}
	return d.last - back
}

func (d *Disk) mismatch(want, slot, have uint64) {
	d.mismatches.Add(1)
	d.problems.Add(fmt.Errorf("disk: record %d was synced, but slot %d begins with %d", want, slot, have))
}

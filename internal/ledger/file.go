package ledger

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"
)

// disk is what a record's file needs of the operating system, so that tests can
// tear its writes.
type disk interface {
	ReadAt(p []byte, off int64) (int, error)
	WriteAt(p []byte, off int64) (int, error)
	// Datasync makes what was written durable.
	Datasync() error
	Close() error
}

// osDisk is the real thing.
type osDisk struct{ *os.File }

func (d osDisk) Datasync() error { return unix.Fdatasync(int(d.Fd())) }

// slots is a record's open file.
type slots struct {
	disk disk
	seq  uint64 // of the newest record, durable or not
	// durable is the slot of the last durable record, which no write touches.
	durable int
}

// errDamaged says that neither slot of a file holds a record.
var errDamaged = errors.New("neither slot holds a valid record")

// errUncertain says that nobody knows which record the disk now holds.
var errUncertain = errors.New("the disk holds the old record or the new one")

// createSlots makes the file of a new record, in full: no later write has to
// allocate anything.
func createSlots(path string, r Record) (s *slots, err error) {
	slot, err := encodeSlot(r, 1)
	if err != nil {
		return nil, err
	}
	temp := path + ".new"
	f, err := os.OpenFile(temp, os.O_RDWR|os.O_CREATE|os.O_TRUNC, 0o600)
	if err != nil {
		return nil, fmt.Errorf("create record: %w", err)
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, f.Close())
		}
	}()
	if _, err := f.Write(append(slot, make([]byte, slotSize)...)); err != nil {
		return nil, fmt.Errorf("write new record: %w", err)
	}
	if err := f.Sync(); err != nil {
		return nil, fmt.Errorf("sync new record: %w", err)
	}
	if err := os.Rename(temp, path); err != nil {
		return nil, fmt.Errorf("put new record in place: %w", err)
	}
	if err := syncDir(filepath.Dir(path)); err != nil {
		return nil, err
	}
	return &slots{disk: osDisk{f}, seq: 1}, nil
}

// openSlots reads an existing file.
func openSlots(path string) (*slots, Record, error) {
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		return nil, Record{}, fmt.Errorf("open record: %w", err)
	}
	s, r, err := readSlots(osDisk{f})
	if err != nil {
		return nil, Record{}, errors.Join(err, f.Close())
	}
	return s, r, nil
}

// readSlots finds the record in a file and makes durable what it has read: an
// agent that was killed may have left a record that only the page cache has.
func readSlots(d disk) (*slots, Record, error) {
	if err := d.Datasync(); err != nil {
		return nil, Record{}, fmt.Errorf("sync record: %w", err)
	}
	s := &slots{disk: d}
	var newest Record
	slot := make([]byte, slotSize)
	for i := range 2 {
		if n, err := d.ReadAt(slot, int64(i)*slotSize); n < slotSize {
			return nil, Record{}, fmt.Errorf("%w: read slot %d: %w", errDamaged, i, err)
		}
		r, seq, err := decodeSlot(slot)
		if err == nil && seq > s.seq {
			newest, s.seq, s.durable = r, seq, i
		}
	}
	if s.seq == 0 {
		return nil, Record{}, errDamaged
	}
	return s, newest, nil
}

// write makes r the record. If durable is not set it survives this process
// only. On error the record is still old, for certain, unless the error is
// errUncertain.
func (s *slots) write(r, old Record, durable bool) error {
	err := s.put(r, durable)
	if err == nil {
		return nil
	}
	// The slot may hold the new record, here or on the disk. Take it back.
	if rerr := s.put(old, true); rerr != nil {
		return errors.Join(errUncertain, err, rerr)
	}
	return err
}

// put writes one slot. The durable record's slot is left alone, so that it
// stands whatever becomes of this write.
func (s *slots) put(r Record, durable bool) error {
	slot, err := encodeSlot(r, s.seq+1)
	if err != nil {
		return err
	}
	target := 1 - s.durable
	s.seq++ // also after a failure: what is in the slot must not win again
	if _, err := s.disk.WriteAt(slot, int64(target)*slotSize); err != nil {
		return fmt.Errorf("write record: %w", err)
	}
	if !durable {
		return nil
	}
	if err := s.disk.Datasync(); err != nil {
		return fmt.Errorf("sync record: %w", err)
	}
	s.durable = target
	return nil
}

func syncDir(dir string) error {
	d, err := os.Open(dir)
	if err != nil {
		return fmt.Errorf("open folder of records: %w", err)
	}
	defer d.Close()
	if err := d.Sync(); err != nil {
		return fmt.Errorf("sync folder of records: %w", err)
	}
	return nil
}

package ledger

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/lmctl/lmctl/migrate"
)

// suffix ends the names of records' files.
const suffix = ".record"

// tombstoneLife is how long a host remembers a guest that it has no more.
const tombstoneLife = 30 * 24 * time.Hour

// Ledger is all records of one host.
type Ledger struct {
	dir  string
	host string
	boot string

	mu     sync.Mutex
	guests map[string]*entry
	closed bool
}

// entry is one guest's record and its file. The file is nil for a damaged one.
type entry struct {
	record Record
	file   *slots
}

// Ledger is both sides' ledger of the engine.
var (
	_ migrate.SourceLedger      = (*Ledger)(nil)
	_ migrate.DestinationLedger = (*Ledger)(nil)
)

// BootID is the id of this boot of the host.
func BootID() (string, error) {
	id, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	if err != nil {
		return "", fmt.Errorf("ledger: read the id of this boot: %w", err)
	}
	return strings.TrimSpace(string(id)), nil
}

// Open reads the records in dir, which is created if need be, for host in its
// given boot. A record that cannot be read does not stop it: the guest is in
// Damaged then, and log hears why. The caller sees to it that only one process
// opens a folder.
func Open(dir, host, boot string, log *slog.Logger) (*Ledger, error) {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, fmt.Errorf("ledger: create folder: %w", err)
	}
	list, err := os.ReadDir(dir)
	if err != nil {
		return nil, fmt.Errorf("ledger: list records: %w", err)
	}
	l := &Ledger{dir: dir, host: host, boot: boot, guests: make(map[string]*entry)}
	for _, item := range list {
		guest, ok := strings.CutSuffix(item.Name(), suffix)
		if !ok || CheckGuest(guest) != nil {
			continue
		}
		l.guests[guest] = openEntry(filepath.Join(dir, item.Name()), guest, log)
	}
	if err := l.prune(time.Now().Add(-tombstoneLife)); err != nil {
		return nil, errors.Join(err, l.Close())
	}
	return l, nil
}

func openEntry(path, guest string, log *slog.Logger) *entry {
	file, record, err := openSlots(path)
	if err == nil && record.Guest != guest {
		err = errors.Join(fmt.Errorf("it is of guest %q", record.Guest), file.disk.Close())
	}
	if err != nil {
		log.Error("a guest's record cannot be read", "guest", guest, "path", path, "error", err)
		return &entry{record: Record{State: Damaged, Guest: guest}}
	}
	return &entry{record: record, file: file}
}

// prune removes what is remembered of guests that left before a time.
func (l *Ledger) prune(before time.Time) error {
	for guest, e := range l.guests {
		if e.record.State == Gone && e.record.Time.Before(before) {
			if err := l.remove(guest); err != nil {
				return fmt.Errorf("ledger: remove old record of guest %s: %w", guest, err)
			}
		}
	}
	return nil
}

// Close closes the files. Nothing is lost by leaving it out.
func (l *Ledger) Close() error {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.closed = true
	var errs []error
	for _, e := range l.guests {
		if e.file != nil {
			errs = append(errs, e.file.disk.Close())
			e.file = nil
		}
	}
	return errors.Join(errs...)
}

// Boot is the id of the boot in which the ledger writes.
func (l *Ledger) Boot() string { return l.boot }

// Get is the record of a guest, in None if there is none.
func (l *Ledger) Get(guest string) Record {
	l.mu.Lock()
	defer l.mu.Unlock()
	if e := l.guests[guest]; e != nil {
		return e.record
	}
	return Record{Guest: guest}
}

// List is every record, by name.
func (l *Ledger) List() []Record {
	l.mu.Lock()
	defer l.mu.Unlock()
	records := make([]Record, 0, len(l.guests))
	for _, guest := range slices.Sorted(maps.Keys(l.guests)) {
		records = append(records, l.guests[guest].record)
	}
	return records
}

// Owns says, as an error, why this host may not run a guest.
func (l *Ledger) Owns(guest string) error {
	r := l.Get(guest)
	if !r.owns() {
		return &StateError{Op: "run", Guest: guest, State: r.State, Reason: "this host does not own it"}
	}
	return nil
}

// apply takes one step and writes it down.
func (l *Ledger) apply(ctx context.Context, op Op, h migrate.Handover, durable bool) error {
	if err := context.Cause(ctx); err != nil {
		return fmt.Errorf("ledger: %s guest %s: %w", op, h.Guest, err)
	}
	if err := CheckGuest(h.Guest); err != nil {
		return fmt.Errorf("ledger: %s: %w", op, err)
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.closed {
		return fmt.Errorf("ledger: %s guest %s: %w", op, h.Guest, fs.ErrClosed)
	}
	old := Record{Guest: h.Guest}
	if e := l.guests[h.Guest]; e != nil {
		old = e.record
	}
	next, err := Step(old, op, h, l.boot)
	if err != nil {
		return err
	}
	next.Time = time.Now().UTC()
	if err := l.store(old, next, durable); err != nil {
		return fmt.Errorf("ledger: %s guest %s: %w", op, h.Guest, err)
	}
	return nil
}

// store puts next in the place of old, on disk and then in memory.
func (l *Ledger) store(old, next Record, durable bool) error {
	e := l.guests[next.Guest]
	switch {
	case next.State == None:
		if e == nil {
			return nil
		}
		return l.remove(next.Guest)
	case e == nil || e.file == nil:
		file, err := createSlots(l.path(next.Guest), next)
		if err != nil {
			return err
		}
		l.guests[next.Guest] = &entry{record: next, file: file}
		return nil
	}
	if err := e.file.write(next, old, durable); err != nil {
		if errors.Is(err, errUncertain) {
			// Until the file is opened again nobody may rely on it.
			e.record.State = Damaged
			err = errors.Join(err, e.file.disk.Close())
			e.file = nil
		}
		return err
	}
	e.record = next
	return nil
}

func (l *Ledger) remove(guest string) error {
	if err := os.Remove(l.path(guest)); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	e := l.guests[guest]
	delete(l.guests, guest)
	if e.file != nil {
		if err := e.file.disk.Close(); err != nil {
			return err
		}
	}
	return syncDir(l.dir)
}

func (l *Ledger) path(guest string) string { return filepath.Join(l.dir, guest+suffix) }

package ledger

import (
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"hash/crc32"
	"regexp"
	"time"

	"github.com/lmctl/lmctl/migrate"
)

// State is what a host knows of a guest.
type State string

// The states of a record. A guest that a host has no record of is in None.
const (
	None       State = ""
	Owned      State = "owned"       // the guest is this host's, at Epoch
	Moving     State = "moving"      // owned, and about to be suspended for Handover
	HandedOver State = "handed-over" // Handover is committed: the destination owns the guest
	Prepared   State = "prepared"    // a shell exists for Handover, in boot Boot
	Accepted   State = "accepted"    // the shell of Handover may have run
	Withdrawn  State = "withdrawn"   // Handover was not run here and never will be
	Gone       State = "gone"        // this host had the guest, and has it no more
	Contested  State = "contested"   // owned, and outranked by another owner while it ran here
	Damaged    State = "damaged"     // the record cannot be read: only a claim helps
)

// Record is what a host durably knows of one guest.
type Record struct {
	State State  `json:"state"`
	Guest string `json:"guest"`
	UUID  string `json:"uuid"`
	// Epoch counts the owners of the guest. It is the epoch that this host owns
	// (Owned, Moving), or the last that it has heard of.
	Epoch uint64 `json:"epoch"`
	// Handover is the one that led to the state, if one did. In Owned it is the
	// one by which the guest came here; in Gone the one by which it went.
	Handover *migrate.Handover `json:"handover,omitempty"`
	// Boot identifies the boot of this host in which the record was written.
	Boot string    `json:"boot"`
	Time time.Time `json:"time"`
}

// owns says whether this host may run the guest by this record.
func (r Record) owns() bool { return r.State == Owned || r.State == Moving }

// handover is the id of the record's handover, or nothing.
func (r Record) handover() string {
	if r.Handover == nil {
		return ""
	}
	return r.Handover.ID
}

// A slot of a record's file:
//
//	 0  8  magic
//	 8  8  sequence number, little endian
//	16  4  length of the body
//	20  4  CRC-32C of the slot with this field zero, header and body
//	24     body, JSON
const (
	slotSize   = 4096
	slotHeader = 24
	slotMagic  = "lmctlrec"
	maxBody    = slotSize - slotHeader
)

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

// errSlot says that a slot holds no valid record: never written, or torn.
var errSlot = errors.New("no valid record in the slot")

// encodeSlot writes a record into a fresh slot.
func encodeSlot(r Record, seq uint64) ([]byte, error) {
	body, err := json.Marshal(r)
	if err != nil {
		return nil, fmt.Errorf("encode record: %w", err)
	}
	if len(body) > maxBody {
		return nil, fmt.Errorf("encode record: %d bytes do not fit into a slot of %d", len(body), maxBody)
	}
	slot := make([]byte, slotSize)
	copy(slot, slotMagic)
	binary.LittleEndian.PutUint64(slot[8:], seq)
	binary.LittleEndian.PutUint32(slot[16:], uint32(len(body)))
	copy(slot[slotHeader:], body)
	binary.LittleEndian.PutUint32(slot[20:], slotSum(slot))
	return slot, nil
}

// decodeSlot reads a slot, which may hold anything.
func decodeSlot(slot []byte) (Record, uint64, error) {
	if len(slot) != slotSize || string(slot[:8]) != slotMagic {
		return Record{}, 0, errSlot
	}
	n := binary.LittleEndian.Uint32(slot[16:])
	if n > maxBody || binary.LittleEndian.Uint32(slot[20:]) != slotSum(slot) {
		return Record{}, 0, errSlot
	}
	var r Record
	if err := json.Unmarshal(slot[slotHeader:slotHeader+n], &r); err != nil {
		return Record{}, 0, fmt.Errorf("%w: %v", errSlot, err)
	}
	if err := r.check(); err != nil {
		return Record{}, 0, fmt.Errorf("%w: %v", errSlot, err)
	}
	return r, binary.LittleEndian.Uint64(slot[8:]), nil
}

// slotSum is the checksum of a whole slot but for the checksum itself.
func slotSum(slot []byte) uint32 {
	sum := crc32.Update(0, castagnoli, slot[:20])
	sum = crc32.Update(sum, castagnoli, make([]byte, 4))
	return crc32.Update(sum, castagnoli, slot[slotHeader:])
}

// check says what no record that this package wrote can be.
func (r Record) check() error {
	switch r.State {
	case Owned, Gone, Contested:
	case Moving, HandedOver, Prepared, Accepted, Withdrawn:
		if r.Handover == nil {
			return fmt.Errorf("state %s without a handover", r.State)
		}
	default:
		return fmt.Errorf("unknown state %q", r.State)
	}
	if err := CheckGuest(r.Guest); err != nil {
		return err
	}
	if h := r.Handover; h != nil {
		return checkHandover(*h)
	}
	return nil
}

// guestPattern holds for the names of guests: they are names of files here.
var guestPattern = regexp.MustCompile(`^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$`)

// CheckGuest says why name cannot be a guest's.
func CheckGuest(name string) error {
	if !guestPattern.MatchString(name) {
		return fmt.Errorf("guest name %q: 1 to 64 letters, digits, dots, dashes and underscores, beginning with a letter or digit", name)
	}
	return nil
}

// maxID bounds ids and UUIDs that come from another host.
const maxID = 64

func checkHandover(h migrate.Handover) error {
	if h.ID == "" || len(h.ID) > maxID || len(h.UUID) > maxID {
		return fmt.Errorf("handover of guest %q: id or UUID empty or over %d bytes", h.Guest, maxID)
	}
	for _, name := range []string{h.Guest, h.Source, h.Destination} {
		if !guestPattern.MatchString(name) {
			return fmt.Errorf("handover %s: %q is no name of a guest or host", h.ID, name)
		}
	}
	if h.Source == h.Destination {
		return fmt.Errorf("handover %s: from host %s to itself", h.ID, h.Source)
	}
	if h.Epoch == 0 {
		return fmt.Errorf("handover %s: epoch zero", h.ID)
	}
	return nil
}

// Package control is how a lab's Linux guest is told what to do, and what it
// says of itself: the settings on its kernel command line, and a protocol of one
// JSON object a line, a Request each way and a Reply back, over TCP at
// ControlPort or over the serial console.
package control

import "time"

// Ports of the guest's services.
const (
	// NumberedPort is TCP. For each line with a decimal number the guest
	// answers with a line of the same number, a number of its own that goes up
	// by one with each reply it ever gave, its monotonic time in nanoseconds
	// and its boot id.
	NumberedPort = 7001
	// EchoPort is UDP: each datagram comes back as it is.
	EchoPort = 7002
	// ControlPort is TCP: a Request a line, a Reply a line.
	ControlPort = 7003
)

// Marks that begin the lines that the guest writes to its serial console. A
// JSON Status follows each but the last, which a Reply follows.
const (
	ReadyMark  = "LMCTL-READY "
	StatusMark = "LMCTL-STATUS "
	ReplyMark  = "LMCTL-REPLY "
)

// MaxLine is the longest line of the protocol, in bytes.
const MaxLine = 64 << 10

// Verb is what a Request asks for.
type Verb string

// The verbs.
const (
	GetStatus  Verb = "status"   // nothing but the Status, which every Reply has
	SetMemory  Verb = "memory"   // Request.Memory is what the writer does from now on
	SetDisk    Verb = "disk"     // Request.Disk is what the disk writer does from now on
	SetTick    Verb = "tick"     // Request.Tick is the clock's tick from now on
	ResetClock Verb = "reset"    // forget the clock's largest gap
	CheckAll   Verb = "check"    // check all of memory and disk now, and answer then
	PowerOff   Verb = "poweroff" // answer, then power down
)

// Request asks the guest for something.
type Request struct {
	Do     Verb           `json:"do"`
	Memory *MemorySetting `json:"memory,omitempty"`
	Disk   *DiskSetting   `json:"disk,omitempty"`
	Tick   time.Duration  `json:"tick_ns,omitempty"`
}

// Reply answers a Request. Error is empty if what was asked for is done.
type Reply struct {
	Error  string  `json:"error,omitempty"`
	Status *Status `json:"status,omitempty"`
}

// Status is what the guest says of itself. Counters only ever go up.
type Status struct {
	OK       bool          `json:"ok"`       // nothing was ever found wrong
	Problems []string      `json:"problems"` // the first few things that were
	BootID   string        `json:"boot_id"`  // fresh for every boot
	Uptime   time.Duration `json:"uptime_ns"`
	Memory   MemoryStatus  `json:"memory"`
	Disk     *DiskStatus   `json:"disk,omitempty"` // nil without a disk
	Clock    ClockStatus   `json:"clock"`
	Net      NetStatus     `json:"net"`
}

// MemoryStatus is the account of the memory writer and checker.
type MemoryStatus struct {
	Setting    MemorySetting `json:"setting"`
	Static     int64         `json:"static"` // bytes written once, at boot
	Written    uint64        `json:"written_pages"`
	Checked    uint64        `json:"checked_pages"`
	Sweeps     uint64        `json:"sweeps"` // times that every page was checked
	Mismatches uint64        `json:"mismatches"`
}

// DiskStatus is the account of the disk writer and checker.
type DiskStatus struct {
	Setting    DiskSetting `json:"setting"`
	Device     string      `json:"device"`
	Last       uint64      `json:"last_record"` // number of the last record that is on stable storage
	Checked    uint64      `json:"checked_records"`
	Mismatches uint64      `json:"mismatches"`
	Errors     uint64      `json:"errors"` // writes, syncs and reads that failed
}

// ClockStatus is the account of the clock.
type ClockStatus struct {
	Tick       time.Duration `json:"tick_ns"`
	Ticks      uint64        `json:"ticks"`
	LargestGap time.Duration `json:"largest_gap_ns"` // between two ticks, since the last reset
	// TickGPA is the guest physical address of a 32-bit word that goes up by
	// one with each tick, to be watched from outside. Zero if not known.
	TickGPA uint64 `json:"tick_gpa"`
}

// NetStatus is the account of the network services.
type NetStatus struct {
	Accepted   uint64 `json:"accepted"`     // connections to the numbering service
	Replies    uint64 `json:"replies"`      // the last number given out by it
	OutOfOrder uint64 `json:"out_of_order"` // requests whose number was not one above the one before
	Echoed     uint64 `json:"echoed"`       // datagrams
}

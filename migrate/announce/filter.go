package announce

import (
	"encoding/binary"
	"fmt"
	"net"

	"github.com/mdlayher/ethernet"
	"golang.org/x/net/bpf"
	"golang.org/x/sys/unix"
)

// Offsets in an untagged Ethernet frame.
const (
	offSource    = 6
	offType      = 12
	offIP        = 14
	off4Fragment = offIP + 6
	off4Protocol = offIP + 9
	off6Next     = offIP + 6
	offICMPv6    = offIP + 40

	portDHCPServer = 67
	portDHCPClient = 68

	icmpRouterAdvertisement   = 134
	icmpNeighborSolicitation  = 135
	icmpNeighborAdvertisement = 136
)

// snapLength is how much of a frame is copied to the learner: a DHCP message
// on an ordinary link fits whole.
const snapLength = 2048

// step is an instruction of a filter with its jump targets by name. An empty
// name means the next step.
type step struct {
	label      string
	ins        bpf.Instruction
	yes, other string // where a jump goes, and where if its condition fails
}

// learnFilter lets pass, of what goes through a tap:
//
//   - from the guest, with its MAC: ARP, DHCP to a server, and ICMPv6 router
//     advertisements, neighbour solicitations and advertisements;
//   - to the guest, from others: ARP and neighbour advertisements, which may
//     say that an address is somebody else's, and DHCP to a client.
//
// All else is dropped in the kernel, before a byte is copied. Frames with a
// VLAN tag (which the kernel has taken off by now) belong to networks inside
// the guest and are dropped too.
func learnFilter(mac net.HardwareAddr) ([]bpf.RawInstruction, error) {
	high := uint32(binary.BigEndian.Uint16(mac[:2]))
	low := binary.BigEndian.Uint32(mac[2:])
	load := func(off, size uint32) bpf.Instruction { return bpf.LoadAbsolute{Off: off, Size: int(size)} }
	eq := func(v uint32) bpf.Instruction { return bpf.JumpIf{Cond: bpf.JumpEqual, Val: v} }
	steps := []step{
		{ins: bpf.LoadExtension{Num: bpf.ExtVLANTagPresent}},
		{ins: eq(0), other: "drop"},
		{ins: bpf.LoadExtension{Num: bpf.ExtType}},
		{ins: eq(unix.PACKET_OUTGOING), yes: "out"},

		{ins: load(offSource+2, 4)},
		{ins: eq(low), other: "drop"},
		{ins: load(offSource, 2)},
		{ins: eq(high), other: "drop"},
		{ins: load(offType, 2)},
		{ins: eq(uint32(ethernet.EtherTypeARP)), yes: "keep"},
		{ins: eq(uint32(ethernet.EtherTypeIPv6)), yes: "in6"},
		{ins: eq(uint32(ethernet.EtherTypeIPv4)), other: "drop"},
		{ins: bpf.LoadConstant{Dst: bpf.RegA, Val: portDHCPServer}},
		{ins: bpf.StoreScratch{Src: bpf.RegA, N: 0}},
		{ins: bpf.Jump{}, yes: "dhcp"},
		{ins: load(off6Next, 1), label: "in6"},
		{ins: eq(protocolICMPv6), other: "drop"},
		{ins: load(offICMPv6, 1)},
		{ins: bpf.JumpIf{Cond: bpf.JumpLessThan, Val: icmpRouterAdvertisement}, yes: "drop"},
		{ins: bpf.JumpIf{Cond: bpf.JumpGreaterThan, Val: icmpNeighborAdvertisement}, yes: "drop", other: "keep"},

		{ins: load(offSource+2, 4), label: "out"},
		{ins: eq(low), other: "others"},
		{ins: load(offSource, 2)},
		{ins: eq(high), yes: "drop"},
		{ins: load(offType, 2), label: "others"},
		{ins: eq(uint32(ethernet.EtherTypeARP)), yes: "keep"},
		{ins: eq(uint32(ethernet.EtherTypeIPv6)), yes: "out6"},
		{ins: eq(uint32(ethernet.EtherTypeIPv4)), other: "drop"},
		{ins: bpf.LoadConstant{Dst: bpf.RegA, Val: portDHCPClient}},
		{ins: bpf.StoreScratch{Src: bpf.RegA, N: 0}},
		{ins: bpf.Jump{}, yes: "dhcp"},
		{ins: load(off6Next, 1), label: "out6"},
		{ins: eq(protocolICMPv6), other: "drop"},
		{ins: load(offICMPv6, 1)},
		{ins: eq(icmpNeighborAdvertisement), yes: "keep", other: "drop"},

		// UDP, the first fragment or none, to the port in the scratch word.
		{ins: load(off4Protocol, 1), label: "dhcp"},
		{ins: eq(protocolUDP), other: "drop"},
		{ins: load(off4Fragment, 2)},
		{ins: bpf.JumpIf{Cond: bpf.JumpBitsSet, Val: 0x1fff}, yes: "drop"},
		{ins: bpf.LoadMemShift{Off: offIP}},
		{ins: bpf.LoadIndirect{Off: offIP + 2, Size: 2}},
		{ins: bpf.LoadScratch{Dst: bpf.RegX, N: 0}},
		{ins: bpf.JumpIfX{Cond: bpf.JumpEqual}, yes: "keep"},

		{ins: bpf.RetConstant{Val: 0}, label: "drop"},
		{ins: bpf.RetConstant{Val: snapLength}, label: "keep"},
	}
	return link(steps)
}

// link resolves the labels and assembles the steps.
func link(steps []step) ([]bpf.RawInstruction, error) {
	at := make(map[string]int)
	for i, s := range steps {
		if s.label != "" {
			at[s.label] = i
		}
	}
	skip := func(from int, label string) (uint8, error) {
		if label == "" {
			return 0, nil
		}
		to, ok := at[label]
		if d := to - from - 1; ok && d >= 0 && d < 256 {
			return uint8(d), nil
		}
		return 0, fmt.Errorf("filter: step %d cannot jump to %q", from, label)
	}
	program := make([]bpf.Instruction, len(steps))
	for i, s := range steps {
		yes, err := skip(i, s.yes)
		if err != nil {
			return nil, err
		}
		other, err := skip(i, s.other)
		if err != nil {
			return nil, err
		}
		switch ins := s.ins.(type) {
		case bpf.JumpIf:
			ins.SkipTrue, ins.SkipFalse = yes, other
			program[i] = ins
		case bpf.JumpIfX:
			ins.SkipTrue, ins.SkipFalse = yes, other
			program[i] = ins
		case bpf.Jump:
			ins.Skip = uint32(yes)
			program[i] = ins
		default:
			program[i] = ins
		}
	}
	raw, err := bpf.Assemble(program)
	if err != nil {
		return nil, fmt.Errorf("filter: %w", err)
	}
	return raw, nil
}

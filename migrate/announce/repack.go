package announce

import (
	"encoding/binary"
	"errors"
	"net"

	"github.com/mdlayher/ethernet"
	"golang.org/x/sys/unix"
)

// offloadHeader is the size of struct virtio_net_hdr (linux/virtio_net.h), the
// common beginning of all virtio-net headers and the one that packet sockets
// take.
const offloadHeader = 10

// Fields of struct virtio_net_hdr.
const (
	hdrFlags     = 0
	hdrGSOType   = 1
	hdrLength    = 2
	hdrGSOSize   = 4
	hdrCsumStart = 6
	hdrCsumOff   = 8

	flagNeedsCsum = 1
	gsoTypeMask   = 0x7f // without GSO_ECN
)

var (
	errMalformed = errors.New("malformed frame")
	errNotForIt  = errors.New("not a unicast frame from another machine to the guest")
)

// repack turns what a packet socket with PACKET_VNET_HDR received into what one
// sends: a virtio-net header of 10 bytes in native byte order, from which the
// kernel completes checksums and cuts segments, and the frame, with from as its
// Ethernet source. It fails for a frame that is not the guest's. It writes into
// b and returns it.
func repack(b []byte, guest, from net.HardwareAddr) ([]byte, error) {
	if len(b) < offloadHeader+offIP {
		return nil, errMalformed
	}
	eth := b[offloadHeader:]
	own := string(eth[offSource:offType]) == string(guest)
	if string(eth[:offSource]) != string(guest) || own || eth[offSource]&1 != 0 {
		return nil, errNotForIt
	}
	b[hdrFlags] &= flagNeedsCsum
	if err := checkOffload([offloadHeader]byte(b), len(eth)); err != nil {
		return nil, err
	}
	copy(eth[offSource:], from)
	return b, nil
}

// checkOffload refuses a header that does not fit a frame of size bytes.
func checkOffload(hdr [offloadHeader]byte, size int) error {
	needs := hdr[hdrFlags]&flagNeedsCsum != 0
	if needs {
		start := int(binary.NativeEndian.Uint16(hdr[hdrCsumStart:]))
		offset := int(binary.NativeEndian.Uint16(hdr[hdrCsumOff:]))
		if start < offIP || start+offset+2 > size {
			return errMalformed
		}
	}
	if hdr[hdrGSOType]&gsoTypeMask == unix.VIRTIO_NET_HDR_GSO_NONE {
		return nil
	}
	if !needs || binary.NativeEndian.Uint16(hdr[hdrGSOSize:]) == 0 {
		return errMalformed
	}
	return nil
}

// tag puts an 802.1Q tag into a repacked frame that has none, as the bridge
// would on a port where the tap's VLAN is a tagged one.
func tag(b []byte, vlan uint16) []byte {
	kind := ethernet.EtherType(binary.BigEndian.Uint16(b[offloadHeader+offType:]))
	if vlan == 0 || kind == ethernet.EtherTypeVLAN || kind == ethernet.EtherTypeServiceVLAN {
		return b
	}
	return insertTag(b, uint16(ethernet.EtherTypeVLAN), vlan)
}

// insertTag puts a tag with this protocol and control information in front of
// the type of a frame that has a virtio-net header.
func insertTag(b []byte, protocol, control uint16) []byte {
	const at, size = offloadHeader + offType, 4
	out := make([]byte, 0, len(b)+size)
	out = append(out, b[:at]...)
	out = binary.BigEndian.AppendUint16(out, protocol)
	out = binary.BigEndian.AppendUint16(out, control)
	out = append(out, b[at:]...)
	for _, off := range []int{hdrLength, hdrCsumStart} {
		if v := binary.NativeEndian.Uint16(out[off:]); v != 0 {
			binary.NativeEndian.PutUint16(out[off:], v+size)
		}
	}
	return out
}

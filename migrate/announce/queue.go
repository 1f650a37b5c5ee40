package announce

import (
	"encoding/binary"
	"errors"
	"fmt"
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

// tapFormat is how frames come out of a tap.
type tapFormat struct {
	info   int // bytes of struct tun_pi, 0 or 4
	header int // bytes of the virtio-net header, 0 for none
	order  binary.ByteOrder
}

// probeTap asks the tun driver for the format and the name of fd's tap.
func probeTap(fd int) (tapFormat, string, error) {
	ifr, err := unix.NewIfreq("")
	if err != nil {
		return tapFormat{}, "", err
	}
	if err := unix.IoctlIfreq(fd, unix.TUNGETIFF, ifr); err != nil {
		return tapFormat{}, "", fmt.Errorf("TUNGETIFF: %w", err)
	}
	flags := ifr.Uint16()
	if flags&unix.IFF_TAP == 0 {
		return tapFormat{}, "", fmt.Errorf("%s is not a tap", ifr.Name())
	}
	f := tapFormat{order: binary.NativeEndian}
	if flags&unix.IFF_NO_PI == 0 {
		f.info = 4
	}
	if flags&unix.IFF_VNET_HDR == 0 {
		return f, ifr.Name(), nil
	}
	size, err := unix.IoctlGetUint32(fd, unix.TUNGETVNETHDRSZ)
	if err != nil {
		return tapFormat{}, "", fmt.Errorf("TUNGETVNETHDRSZ: %w", err)
	}
	if size < offloadHeader || size > 256 {
		return tapFormat{}, "", fmt.Errorf("virtio-net header of %d bytes", size)
	}
	f.header = int(size)
	little, err := unix.IoctlGetUint32(fd, unix.TUNGETVNETLE)
	if err != nil {
		return tapFormat{}, "", fmt.Errorf("TUNGETVNETLE: %w", err)
	}
	if little != 0 {
		f.order = binary.LittleEndian
	}
	return f, ifr.Name(), nil
}

var (
	errMalformed = errors.New("malformed frame")
	errNotForIt  = errors.New("not a unicast frame from another machine to the guest")
)

// repack turns what was read from a tap into what a packet socket with
// PACKET_VNET_HDR sends: a virtio-net header of 10 bytes in native byte order,
// from which the kernel completes checksums and cuts segments, and the frame,
// with from as its Ethernet source. It fails for a frame that is not the
// guest's. It writes into b and may return a part of it.
func (f tapFormat) repack(b []byte, guest, from net.HardwareAddr) ([]byte, error) {
	if len(b) < f.info+f.header+offIP {
		return nil, errMalformed
	}
	var hdr [offloadHeader]byte
	if f.header > 0 {
		old := b[f.info:]
		hdr[hdrFlags], hdr[hdrGSOType] = old[hdrFlags]&flagNeedsCsum, old[hdrGSOType]
		for _, off := range []int{hdrLength, hdrGSOSize, hdrCsumStart, hdrCsumOff} {
			binary.NativeEndian.PutUint16(hdr[off:], f.order.Uint16(old[off:]))
		}
	}
	eth := b[f.info+f.header:]
	own := string(eth[offSource:offType]) == string(guest)
	if string(eth[:offSource]) != string(guest) || own || eth[offSource]&1 != 0 {
		return nil, errNotForIt
	}
	if err := checkOffload(hdr, len(eth)); err != nil {
		return nil, err
	}
	copy(eth[offSource:], from)
	if f.info+f.header < offloadHeader { // no room in front: move
		return append(hdr[:], eth...), nil
	}
	out := b[f.info+f.header-offloadHeader:]
	copy(out, hdr[:])
	return out, nil
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
	const at, size = offloadHeader + offType, 4
	out := make([]byte, 0, len(b)+size)
	out = append(out, b[:at]...)
	out = binary.BigEndian.AppendUint16(out, uint16(ethernet.EtherTypeVLAN))
	out = binary.BigEndian.AppendUint16(out, vlan)
	out = append(out, b[at:]...)
	for _, off := range []int{hdrLength, hdrCsumStart} {
		if v := binary.NativeEndian.Uint16(out[off:]); v != 0 {
			binary.NativeEndian.PutUint16(out[off:], v+size)
		}
	}
	return out
}

package wire

import "encoding/binary"

// AppendOptionReply adds a reply of type rep to option opt, with its data.
func AppendOptionReply(dst []byte, opt Option, rep OptionReply, data []byte) []byte {
	dst = appendOptionReplyHeader(dst, opt, rep, len(data))
	return append(dst, data...)
}

func appendOptionReplyHeader(dst []byte, opt Option, rep OptionReply, lenBytes int) []byte {
	dst = binary.BigEndian.AppendUint64(dst, magicOptionReply)
	dst = binary.BigEndian.AppendUint32(dst, uint32(opt))
	dst = binary.BigEndian.AppendUint32(dst, uint32(rep))
	return binary.BigEndian.AppendUint32(dst, uint32(lenBytes))
}

// AppendServer adds a RepServer: one name of the answer to OptList.
func AppendServer(dst []byte, name string) []byte {
	dst = appendOptionReplyHeader(dst, OptList, RepServer, 4+len(name))
	dst = binary.BigEndian.AppendUint32(dst, uint32(len(name)))
	return append(dst, name...)
}

// AppendMetaContext adds a RepMetaContext to option opt.
func AppendMetaContext(dst []byte, opt Option, id uint32, name string) []byte {
	dst = appendOptionReplyHeader(dst, opt, RepMetaContext, 4+len(name))
	dst = binary.BigEndian.AppendUint32(dst, id)
	return append(dst, name...)
}

// AppendInfoExport adds the RepInfo that every successful OptInfo and OptGo has.
func AppendInfoExport(dst []byte, opt Option, sizeBytes uint64, flags TransmissionFlags) []byte {
	dst = appendInfoHeader(dst, opt, InfoExport, 10)
	dst = binary.BigEndian.AppendUint64(dst, sizeBytes)
	return binary.BigEndian.AppendUint16(dst, uint16(flags))
}

// AppendInfoText adds a RepInfo whose content is text: InfoName or
// InfoDescription.
func AppendInfoText(dst []byte, opt Option, typ InfoType, text string) []byte {
	dst = appendInfoHeader(dst, opt, typ, len(text))
	return append(dst, text...)
}

// AppendInfoBlockSize adds the RepInfo of the size constraints, in bytes.
func AppendInfoBlockSize(dst []byte, opt Option, minimum, preferred, maximum uint32) []byte {
	dst = appendInfoHeader(dst, opt, InfoBlockSize, 12)
	dst = binary.BigEndian.AppendUint32(dst, minimum)
	dst = binary.BigEndian.AppendUint32(dst, preferred)
	return binary.BigEndian.AppendUint32(dst, maximum)
}

func appendInfoHeader(dst []byte, opt Option, typ InfoType, lenBytes int) []byte {
	dst = appendOptionReplyHeader(dst, opt, RepInfo, 2+lenBytes)
	return binary.BigEndian.AppendUint16(dst, uint16(typ))
}

// AppendExportName adds the whole answer to OptExportName, which has no header.
func AppendExportName(dst []byte, sizeBytes uint64, flags TransmissionFlags, client ClientFlags) []byte {
	dst = binary.BigEndian.AppendUint64(dst, sizeBytes)
	dst = binary.BigEndian.AppendUint16(dst, uint16(flags))
	if client&ClientNoZeroes == 0 {
		dst = append(dst, make([]byte, exportNamePadding)...)
	}
	return dst
}

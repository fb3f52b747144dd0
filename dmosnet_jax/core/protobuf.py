"""Protobuf messages whose definition stands in the code: no generated module that asks for one version of protobuf."""

from typing import Any

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory, text_format


def message_class(definition: str, name: str) -> Any:
    """The class of a message.

    Args:
      definition: a `FileDescriptorProto` in protobuf's text format.
      name: of one of its messages.
    """
    # A pool of its own: TensorFlow may have registered messages of the same names.
    pool = descriptor_pool.DescriptorPool()
    pool.Add(text_format.Parse(definition, descriptor_pb2.FileDescriptorProto()))
    return message_factory.GetMessageClass(pool.FindMessageTypeByName(name))

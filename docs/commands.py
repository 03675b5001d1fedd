def page():
    return "# Commands\n"
